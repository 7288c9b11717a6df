"""A random FLUX pipeline of a few thousand weights, made with the stock classes, and other parts of RL tests."""
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from spatialt2i.core.types import Prompt, Scores

WORDS = ["<pad>", "</s>", "<unk>",
         *"a red green blue circle square triangle left right above below of the and is".split()]


def make_flux(folder, *, guidance=True):
    """Write a stock FLUX pipeline folder: 16 x 16 pixels, 16 latent tokens of 16 channels, width 32."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])

    def tokenizer(length):
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                       model_max_length=length)

    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0))
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                        scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15)
    FluxPipeline(scheduler, vae, clip, tokenizer(16), t5, tokenizer(32), transformer).save_pretrained(folder)
    return folder


def shake(policy, seed=1, size=0.2):
    """Move every adapter weight by Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def prompts_of(step, n=2):
    texts = ["a red circle left of a blue square", "the green triangle is above a red square", "a blue circle",
             "a square and a circle"]
    return [Prompt(f"p{step}-{i}", texts[(step + i) % len(texts)], "table", ()) for i in range(n)]


class Redness:
    """The mean of the red channel minus the blue one's: trivial, and different for every picture."""

    name = "redness"

    def score(self, *, images, prompts):
        assert len(images) == len(prompts)
        pixels = torch.stack([torch.tensor(list(im.tobytes()), dtype=torch.float64).view(-1, 3) for im in images])
        return Scores(mean=(pixels[..., 0] - pixels[..., 2]).mean(1).numpy())
