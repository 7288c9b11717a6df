"""Train ``tiny-flux``, the small FLUX pipeline that the package ships: autoencoder, text encoders and transformer.

    python scripts/train_tiny_flux.py vae  --corpus build/corpus --out build/tiny-flux --steps 3000
    python scripts/train_tiny_text.py --corpus build/corpus --out build/tiny-flux --steps 1200
    python scripts/train_tiny_flux.py flow --corpus build/corpus --out build/tiny-flux --steps 11000

Each part writes checkpoints and continues from them. ``flow`` ends by writing a `diffusers.FluxPipeline` folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel

from _checkpoint import load_average, load_state, make_optimizers, save_state, tensor, use_machine
from spatialt2i.core.device import autocast
from spatialt2i.core.run import atomic_path, file_hash, progress, seed_of
from spatialt2i.rl.policy import LORA_TARGETS
from spatialt2i.tiny.phrases import PHRASES
from spatialt2i.tiny.tokenizer import CLIP_LENGTH, make_tokenizer
from spatialt2i.tiny.world import OBJECTS
from tiny_corpus import CONTACT
from train_tiny_text import Places, make_text_encoder

LATENT_CHANNELS = 8
LATENT_NOISE = 0.25  # at most, of the latents' std, before they are decoded in training
SHIFT = 3.0  # of the training noise levels: what is drawn is decided at high ones
TOP_SHARE, TOP = 0.35, 0.85  # where it is drawn is decided at the highest ones: this share is uniform above that level
LOW, HIGH = 0.05, 0.8  # small and overlapping outlines are decided between these: --low
MEETING = 4.0  # weight of the picture tokens that show more than one object
AUX_TEXT = 0.05  # weight of what is told from the text alone
# Learnt last, so they may be shown more often; "inside" most, where the smallest objects are.
TOUCHING = ("inside", *CONTACT)
AUX_BLOCK = 1  # the single-stream block whose image tokens must tell which object is where


def make_vae() -> AutoencoderKL:
    """An autoencoder with FLUX's class: 64 x 64 pixels to 16 x 16 x 8."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(32, 48, 64), layers_per_block=1,
        latent_channels=LATENT_CHANNELS, norm_num_groups=8, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False, sample_size=64, scaling_factor=1.0, shift_factor=0.0)


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in -1..1."""
    return tensor(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def mixed(args: argparse.Namespace) -> AbstractContextManager:
    """Mixed precision as the command line has it."""
    return autocast(torch.get_default_device(), getattr(torch, args.dtype))


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def log(path: Path, **values: float) -> None:
    """Append one line of figures."""
    with path.open("a") as f:
        f.write(json.dumps(values) + "\n")


def train_vae(args: argparse.Namespace) -> None:
    """L1 + L2 reconstruction of pixels, L2 of their differences (outlines), and a light KL.

    Latents get a little noise before decoding, so that decoding forgives small errors of the transformer.
    """
    torch.manual_seed(args.seed)
    images = np.load(args.corpus / "images.npy", mmap_mode="r")
    hard = scenes_with(TOUCHING, np.load(args.corpus / "tokens.npy", mmap_mode="r"))
    vae = make_vae()
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    state = args.out / "vae_state.safetensors"
    start = load_state(state, module=vae, average=average, optimizers=[optimizer])
    for step in progress(range(start, args.steps), desc="vae", total=args.steps, initial=start):
        rng = np.random.default_rng((args.seed, step))
        torch.manual_seed(args.seed * 1_000_003 + step)
        x = pixels(images[np.sort(pick_scenes(rng, len(images), hard, args))])  # [B, 3, 64, 64]
        with mixed(args):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample()
            noise = LATENT_NOISE * torch.rand(len(z), 1, 1, 1) * z.detach().std()
            y = vae.decode(z + noise * torch.randn_like(z)).sample
        error = y.float() - x
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.logvar.float().exp() - 1 - posterior.logvar.float()).mean()
        outlines = error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()
        loss = error.abs().mean() + error.square().mean() + 2 * outlines + 1e-3 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, 1e-3, 100)
        optimizer.step()
        optimizer.zero_grad()
        blend(average, vae, 0.99)
        if step % 25 == 0:
            log(args.out / "vae.jsonl", step=step, l1=float(error.abs().mean()), kl=float(kl))
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save_state(state, step=step + 1, module=vae, average=average, optimizers=[optimizer])
    vae.load_state_dict(average)
    with torch.no_grad():
        z = vae.eval().encode(pixels(images[:1000])).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    vae.save_pretrained(args.out / "vae")


def blend(average: dict[str, torch.Tensor], module: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of a module's weights, in place."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            average[key].lerp_(value, 1 - decay)


class Flow(torch.nn.Module):
    """What the flow loss trains: the transformer, both text encoders, and two auxiliary readers that are thrown away.

    One predicts from inner image tokens which of the objects covers each quarter of a token. It makes the network bind
    shapes to places early, at noise levels where the picture alone shows colours only. The other goes on with what the
    T5 encoder was taught first: to tell places from the text alone.
    """

    def __init__(self) -> None:
        super().__init__()
        vocab = len(make_tokenizer(max_length=CLIP_LENGTH))
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=4, attention_head_dim=32,
            num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
            axes_dims_rope=(8, 12, 12))
        self.t5 = make_text_encoder()
        self.clip = CLIPTextModel(CLIPTextConfig(
            vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH, pad_token_id=0, bos_token_id=None, eos_token_id=1, projection_dim=64))
        self.reader = torch.nn.Linear(192, 4 * (1 + len(OBJECTS)))
        self.places = Places()
        self._inner: torch.Tensor | None = None
        self.transformer.single_transformer_blocks[AUX_BLOCK].register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        self._inner = output[1]

    def forward(self, x: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor, tokens: torch.Tensor,
                ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Velocity [B, 64, 32], object logits [B, 64, 4, 33] and text states of noisy latents x at levels t [B]."""
        text = self.t5(tokens).last_hidden_state
        pooled = self.clip(tokens).pooler_output
        v = self.transformer(hidden_states=x, timestep=t, guidance=guidance, pooled_projections=pooled,
                             encoder_hidden_states=text, txt_ids=torch.zeros(tokens.shape[1], 3), img_ids=ids,
                             return_dict=False)[0]
        return v.float(), self.reader(self._inner).float().unflatten(-1, (4, -1)), text

    def add_adapter(self, rank: int) -> None:
        """Freeze everything and add a LoRA to the transformer, where RL has its own."""
        self.requires_grad_(False)
        self.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS))

    def compile_blocks(self) -> None:
        """Compile the transformer's blocks, which halves the time of an update; needs a C++ compiler."""
        for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks):
            block.compile(dynamic=False)


def make_latents(args: argparse.Namespace, vae: AutoencoderKL) -> np.ndarray:
    """Packed latents of the whole corpus, [N, 64, 32] float16, computed once per autoencoder and corpus."""
    made = file_hash(args.out / "vae" / "diffusion_pytorch_model.safetensors")
    corpus = (args.corpus / "manifest.json").read_text()
    path = args.out / f"latents-{seed_of(made, corpus):016x}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    images = np.load(args.corpus / "images.npy", mmap_mode="r")
    packed = np.empty((len(images), 64, 4 * LATENT_CHANNELS), dtype=np.float16)
    for i in progress(range(0, len(images), 250), desc="latents"):
        with torch.no_grad(), mixed(args):
            z = vae.encode(pixels(images[i:i + 250])).latent_dist.mean.float()
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        packed[i:i + 250] = FluxPipeline._pack_latents(z, len(z), LATENT_CHANNELS, 16, 16).cpu().numpy()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, packed)
    return packed


def scenes_with(predicates: Sequence[str], tokens: np.ndarray) -> list[np.ndarray]:
    """For each predicate the scenes whose caption states it. tokens: [N, captions, L], as the corpus has them."""
    vocabulary = make_tokenizer(max_length=CLIP_LENGTH)
    ids = [[vocabulary(phrase).input_ids[0] for phrase in PHRASES[predicate]] for predicate in predicates]
    return [np.flatnonzero(np.isin(tokens[:, 0], every).any(1)) for every in ids]


def pick_scenes(rng: np.random.Generator, count: int, hard: list[np.ndarray], args: argparse.Namespace) -> np.ndarray:
    """Indices [B] of a batch's scenes: of all ``count``, and ``args.touching`` of them of one of ``hard`` each."""
    pick = rng.integers(count, size=args.batch)
    for i in np.flatnonzero(rng.random(args.batch) < args.touching):
        pick[i] = rng.choice(hard[rng.integers(len(hard))])
    return pick


def train_flow(args: argparse.Namespace) -> None:
    """Flow matching on v = noise - picture, a tenth of the captions left empty, plus the two auxiliary readers.

    From step ``args.guide_from`` on the target carries classifier-free guidance, so that the guidance input means what
    it means in FLUX.1-dev. With ``args.lora_rank`` nothing but an adapter of that rank is trained, and merged in what
    is written: what fine-tuning teaches a large model is of low rank (arXiv 2106.09685), hence within reach of another
    adapter, while a full update of all matrices is not.
    """
    torch.manual_seed(args.seed)
    if args.start:
        shutil.copytree(args.start.parent / "vae", args.out / "vae", dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.out / "vae").to(torch.get_default_device())
    latents = make_latents(args, vae)
    maps, boxes = np.load(args.corpus / "maps.npy"), np.load(args.corpus / "boxes.npy")
    tokens = np.load(args.corpus / "tokens.npy", mmap_mode="r")
    flow = Flow()
    if args.start:
        load_average(args.start, module=flow)
    else:
        flow.t5.load_state_dict(T5EncoderModel.from_pretrained(args.out / "text").state_dict())
    if args.lora_rank:
        flow.add_adapter(args.lora_rank)
        optimizers = [torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], betas=(0.9, 0.99))]
    else:
        optimizers = make_optimizers(flow, lr=args.lr, lr_matrices=args.lr_matrices)
    average = {k: v.clone() for k, v in flow.state_dict().items()}
    state = args.out / "flow_state.safetensors"
    start = load_state(state, module=flow, average=average, optimizers=optimizers)
    if shutil.which("c++"):
        flow.compile_blocks()
    empty = tensor(make_tokenizer(max_length=CLIP_LENGTH)(
        "", padding="max_length", max_length=tokens.shape[2], return_tensors="np").input_ids)
    weight = torch.ones(1 + len(OBJECTS))
    weight[0] = 0.25  # most of a picture is background
    hard = scenes_with(TOUCHING, tokens)
    saved = time.monotonic()
    for step in progress(range(start, args.steps), desc="flow", total=args.steps, initial=start):
        rng = np.random.default_rng((args.seed, step))
        torch.manual_seed(args.seed * 1_000_003 + step)
        pick = pick_scenes(rng, len(latents), hard, args)
        x0 = tensor(latents[pick].astype(np.float32))  # [B, 64, 32]
        words = tensor(tokens[pick, rng.integers(tokens.shape[1], size=args.batch)].astype(np.int64))
        words[torch.rand(args.batch) < 0.1] = empty
        target = tensor(maps[pick].astype(np.int64)).reshape(-1, 8, 2, 8, 2).permute(0, 1, 3, 2, 4)
        with mixed(args):
            error, reading, text = flow_loss(flow, x0, words, target.reshape(args.batch, -1, 4), weight,
                                             empty if step >= args.guide_from else None, low=args.low)
            telling, found = flow.places(text, words, tensor(boxes[pick].astype(np.float32)))
        (error + args.aux * reading + AUX_TEXT * telling).backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (args.lr, args.lr_matrices), strict=False):  # an adapter has no Muon
            optimizer.param_groups[0]["lr"] = rate(step, args.steps, peak, min(200, args.steps // 5))
            optimizer.step()
            optimizer.zero_grad()
        blend(average, flow, min(0.999, (step + 1) / (step + 100)))
        if step % 50 == 0:
            values = {"error": error, "reading": reading, "telling": telling, "norm": norm, **found}
            log(args.out / "flow.jsonl", step=step, **{k: v.item() for k, v in values.items()})
        if time.monotonic() - saved > 180 or step + 1 == args.steps:
            save_state(state, step=step + 1, module=flow, average=average, optimizers=optimizers)
            saved = time.monotonic()
    write_pipeline(args.out, average, vae, rank=args.lora_rank)


def flow_loss(flow: Flow, x0: torch.Tensor, words: torch.Tensor, target: torch.Tensor, weight: torch.Tensor,
              empty: torch.Tensor | None, *, low: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared velocity error, and cross-entropy of the reader, at random noise levels; the text's states.

    ``target`` [B, 64, 4] tells which object covers each quarter of a picture token (0: none), and ``low`` which share
    of the levels is uniform between `LOW` and `HIGH`.

    With ``empty``, the tokens of the empty caption, half of the batch learns guidance g in 1..5 in one go with the flow
    (model guidance, arXiv 2502.12154): its target is u + (1 - 1 / g) (v - v_empty), whose fixed point in v is
    v_empty + g (E[u] - v_empty). The other half learns the flow as it is, at g = 1.
    """
    t = torch.sigmoid(torch.randn(len(x0)))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    t = torch.where(torch.rand(len(x0)) < TOP_SHARE, TOP + (1 - TOP) * torch.rand(len(x0)), t)
    t = torch.where(torch.rand(len(x0)) < low, LOW + (HIGH - LOW) * torch.rand(len(x0)), t)
    noise = torch.randn_like(x0)
    x, u = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise, noise - x0
    ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, x0.device, torch.float32)
    guidance = 1 + 4 * torch.rand(len(x0))
    half = len(x0) // 2
    # the fused attention's backward pass on CPUs is several times slower than the plain one at these lengths
    with sdpa_kernel(SDPBackend.MATH):
        if empty is not None:
            guidance[half:] = 1
        v, logits, text = flow(x, t, guidance, words, ids)
        if empty is not None:
            with torch.no_grad():
                base = flow(x[:half], t[:half], torch.ones(half), empty.expand(half, -1), ids)[0]
            guided = (words[:half] != empty).any(1) * (1 - 1 / guidance[:half])  # [B / 2]
            u[:half] += guided[:, None, None] * (v[:half].detach() - base)
        lowest = target.masked_fill(target == 0, len(OBJECTS) + 1).amin(-1)  # [B, 64]
        matters = torch.where(lowest < target.amax(-1), MEETING, 1.0)
        error = ((v - u).square().mean(-1) * matters).sum() / matters.sum()
        return error, F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight=weight), text


def write_pipeline(folder: Path, average: dict[str, torch.Tensor], vae: AutoencoderKL, *, rank: int) -> None:
    """The averaged weights, with their adapter of that rank merged, as a stock FluxPipeline folder, in bfloat16."""
    mean = Flow()
    if rank:
        mean.add_adapter(rank)
    mean.load_state_dict(average)
    if rank:
        mean.transformer.fuse_lora()
        mean.transformer.unload_lora()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            # as FLUX.1-dev has it, for pictures of 64 tokens where that draws pictures of 4,096
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=64),
        vae=vae, text_encoder=mean.clip, tokenizer=make_tokenizer(max_length=CLIP_LENGTH), text_encoder_2=mean.t5,
        tokenizer_2=make_tokenizer(max_length=512), transformer=mean.transformer)
    vae.register_to_config(_name_or_path="vae")  # not the folder of this machine that it was read from
    pipeline.to(torch.bfloat16).save_pretrained(folder / "pipeline")
    vae.to(torch.float32)


def main() -> None:
    """Parse the arguments and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "flow"))
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-matrices", type=float, default=2e-3, help="peak learning rate of Muon")
    parser.add_argument("--guide-from", type=int, default=2500, help="first step whose target carries guidance")
    parser.add_argument("--aux", type=float, default=0.25, help="weight of the auxiliary reader")
    parser.add_argument("--start", type=Path,
                        help="flow: the state of another --out, whose averaged weights to go on from")
    parser.add_argument("--lora-rank", type=int, default=0, help="flow: train but an adapter of this rank; 0: all")
    parser.add_argument("--touching", type=float, default=0.0, help="share of scenes picked for objects that touch")
    parser.add_argument("--low", type=float, default=0.0, help=f"flow: share of noise levels from {LOW} to {HIGH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    if args.lora_rank and not args.start:
        parser.error("--lora-rank adapts the weights of --start, which is missing")
    use_machine(device=args.device, threads=args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (train_vae if args.part == "vae" else train_flow)(args)


if __name__ == "__main__":
    main()
