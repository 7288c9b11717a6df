"""Makes a tiny Qwen2.5-VL folder: the stock classes, a small configuration, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spatialt2i.core.run import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

PATCH, MERGE = 8, 1  # a 64 x 64 picture becomes 64 patches and as many visual tokens
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_tiny_qwen(folder: Path, *, tokenizer: PreTrainedTokenizerBase, seed: int, width: int = 128, layers: int = 6,
                   heads: int = 4, vision_width: int = 128, vision_layers: int = 4,
                   image_size: int = 64, merge: int = MERGE) -> Qwen2_5_VLForConditionalGeneration:
    """Write a random model that `Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)` loads.

    Args:
        folder: where the weights, configuration, tokenizer and image processor go.
        tokenizer: has the chat, vision and padding tokens of Qwen2.5-VL.
        seed: of the weights.
        width, layers, heads: of the language model; a head needs a width divisible by 16.
        vision_width, vision_layers: of the vision tower (heads of 32).
        image_size: side of the square pictures that the image processor leaves as they are.
        merge: patches along a side of a visual token; the published models have 2.

    Returns:
        The model that was written, float32, in evaluation mode.

    Raises:
        ValueError: the tokenizer lacks a special token, or the width does not fit the heads.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    missing = [t for t, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None or i == tokenizer.unk_token_id]
    if missing:
        raise ValueError(f"the tokenizer lacks {missing}; add them as special tokens before making the model")
    if width % (16 * heads):
        raise ValueError(f"width {width} must be a multiple of 16 x {heads} heads")
    half = width // heads // 2  # rotary frequencies of one head, shared out over time, height and width
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 2048, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": ids[1], "pad_token_id": tokenizer.pad_token_id,
            # A small base and few temporal frequencies leave height and width frequencies that tell apart the eight
            # rows and columns of visual tokens; the published base would turn all of them by less than a degree.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                "mrope_section": [half // 8, half * 3 // 8, half // 2]},
        },
        vision_config={
            "depth": vision_layers, "hidden_size": vision_width, "intermediate_size": 2 * vision_width,
            "num_heads": vision_width // 32, "patch_size": PATCH, "spatial_merge_size": merge,
            "temporal_patch_size": 1, "window_size": image_size, "out_hidden_size": width,
            "fullatt_block_indexes": list(range(vision_layers)),
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        vision_start_token_id=ids[2], vision_end_token_id=ids[3], image_token_id=ids[4], video_token_id=ids[5],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = ids[1]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=merge, temporal_patch_size=1,
        size={"shortest_edge": image_size**2, "longest_edge": image_size**2})
    settings = processor.to_dict() | {"image_processor_type": "Qwen2VLImageProcessor"}
    write_json(Path(folder) / "preprocessor_config.json", settings)
    return model
