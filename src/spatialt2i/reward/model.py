"""SpatialScore: a Qwen2.5-VL body, a reward token whose embedding alone is learned, and a head that reads it.

The body's own classes do all the work: its `Qwen2_5_VLModel` is called with the token embeddings, and its vocabulary
head never is. What the model reads is one user turn::

    <|im_start|>user
    <|vision_start|><|image_pad|>*n<|vision_end|>{instruction}
    {prompt}<|Reward|>

An empty instruction leaves its line out. What would follow the reward token cannot change its hidden state, because
attention is causal, so it is left out; for the same reason padding on the right needs no mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spatialt2i.core.config import RewardConfig
from spatialt2i.core.device import autocast, torch_dtype
from spatialt2i.core.run import seed_of
from spatialt2i.reward.pixels import PixelReader

REWARD_TOKEN = "<|Reward|>"
_LINEARS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Inputs:
    """B images, each under its own prompt, as the body takes them.

    Attributes:
        input_ids: int64 [B, L], padded on the right.
        position_ids: int64 [3, B, L], time, height and width.
        patches: float32 [N, C*T*P*P], the pixel patches of all images, one after another.
        grids: int64 [B, 3], patches per image in time, height and width.
        reward_at: int64 [B], position of the reward token.
    """

    input_ids: Tensor
    position_ids: Tensor
    patches: Tensor
    grids: Tensor
    reward_at: Tensor

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        return Inputs(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class RewardHead(nn.Module):
    """d - width - ReLU - dropout - hidden - ReLU - 2, always in float32.

    Args:
        size: width of the hidden state that it reads.
        config: widths and dropout.
    """

    def __init__(self, size: int, config: RewardConfig) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.first = nn.Linear(size, config.head_width)
        self.second = nn.Linear(config.head_width, config.head_hidden)
        self.last = nn.Linear(config.head_hidden, 2)

    def forward(self, hidden: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read hidden states.

        Args:
            hidden: [B, d].
            keep: bool [B, width], what dropout leaves, or None for no dropout. It is drawn outside, by a named seed,
                so that it depends neither on the micro-batch nor on the device.

        Returns:
            mu and log sigma, float32 [B] each.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            x = torch.relu(self.first(hidden.float()))
            if keep is not None:
                x = x * keep / (1 - self.dropout)
            mu, log_sigma = self.last(torch.relu(self.second(x))).unbind(-1)
        return mu, log_sigma


class SpatialScoreModel(nn.Module):
    """Backbone, adapter, reward token and head.

    Made by `SpatialScoreModel.from_backbone`; a trained one is read by `SpatialScore.from_pretrained`.

    Attributes:
        backbone: the stock `Qwen2_5_VLForConditionalGeneration`, with the adapter in its language model.
        token: float32 [d], the embedding row of the reward token. It lives beside the embedding table, which stays
            frozen, so tied embeddings and a full table make no difference.
        head: the `RewardHead`.
    """

    def __init__(self, backbone: nn.Module, *, tokenizer, processor, config: RewardConfig, seed: int) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model
        self.config, self.tokenizer = config, tokenizer
        self.dtype = torch_dtype(config.dtype)
        self.pixels = PixelReader(processor, max_pixels=config.max_pixels)
        self.fingerprint = _fingerprint(backbone)
        self.backbone = backbone.requires_grad_(False)
        body = backbone.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "reward", "initial weights"))
            if config.lora_rank:
                inject_adapter_in_model(LoraConfig(
                    r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=_LINEARS), body.language_model)
            self.head = RewardHead(body.config.text_config.hidden_size, config)
        self.token = nn.Parameter(self._first_row(body.get_input_embeddings().weight))
        body.visual.requires_grad_(config.train_vision)
        body.visual.merger.requires_grad_(config.train_merger)
        for p in self.trainable().values():  # a step of 1e-6 is lost in bfloat16 weights; autocast casts what computes
            p.data = p.data.float()
        self._prefix = self._ids("<|im_start|>user\n<|vision_start|>")
        self._instruction = self._ids(f"{config.instruction}\n") if config.instruction else []
        self._image, self._after = self._ids("<|image_pad|>")[0], self._ids("<|vision_end|>")[0]
        self._reward, self._pad = self._ids(REWARD_TOKEN)[0], tokenizer.pad_token_id or 0
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special -= {tokenizer.unk_token_id}  # it only stands for an unknown word
        self._positions: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def from_backbone(cls, backbone: str | Path, *, config: RewardConfig, seed: int,
                      device: torch.device | str = "cpu") -> SpatialScoreModel:
        """A model to train: pre-trained body, new adapter, token and head.

        Args:
            backbone: hub id or folder of a Qwen2.5-VL model with its tokenizer and image processor.
            config: ``config.backbone`` is not read; the caller has resolved it.
            seed: of the new weights.
            device: where it goes.

        Raises:
            OSError: there is no such model; the message is transformers' own.
        """
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        processor = Qwen2VLImageProcessorPil.from_pretrained(backbone)
        body = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch_dtype(config.dtype))
        return cls(body, tokenizer=tokenizer, processor=processor, config=config, seed=seed).to(device).eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.token.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name: adapter, head, token, and merger and vision tower where asked for."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def tokenize(self, prompts: Sequence[str], names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of prompts, checked.

        Args:
            prompts: B texts.
            names: how error messages call them; by default their positions.

        Raises:
            ValueError: a prompt is empty, holds a special token, or is longer than ``max_text_tokens``; the message
                names it.
        """
        names = names or [f"prompt {i}" for i in range(len(prompts))]
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
        for name, text, tokens in zip(names, prompts, ids, strict=True):
            if not text.strip():
                raise ValueError(f"{name}: the prompt is empty; give it a text that says where things are")
            if special := self._special & set(tokens):
                found = self.tokenizer.decode([min(special)])
                raise ValueError(f"{name}: the prompt holds the special token {found}, with which the model marks "
                                 "pictures and turns; leave it out")
            if len(tokens) > self.config.max_text_tokens:
                raise ValueError(f"{name}: {len(tokens)} tokens, but reward.max_text_tokens is "
                                 f"{self.config.max_text_tokens}; shorten it or raise the limit ({text[:60]!r}...)")
        return ids

    def collate(self, pictures: Sequence[np.ndarray], texts: Sequence[list[int]]) -> Inputs:
        """Batch images and tokenised prompts.

        Args:
            pictures: B decoded images, uint8 [H, W, 3] each.
            texts: B lists of token ids from `tokenize`.
        """
        patches, grids = self.pixels(pictures)  # [N, C*T*P*P], [B, 3]
        merge = self.backbone.config.vision_config.spatial_merge_size
        counts = (grids.prod(-1) // merge**2).tolist()
        rows = [[*self._prefix, *[self._image] * n, self._after, *self._instruction, *text, self._reward]
                for n, text in zip(counts, texts, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows])
        kinds, which = torch.unique(grids, dim=0, return_inverse=True)
        positions = torch.stack([self._positions_of(*kind[1:].tolist(), longest) for kind in kinds], dim=1)
        return Inputs(ids, positions[:, which], patches, grids, lengths - 1)

    def forward(self, inputs: Inputs, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score B images.

        Args:
            inputs: from `collate`, on this model's device.
            keep: dropout mask of the head, see `RewardHead`.

        Returns:
            mu and log sigma, float32 [B] each.
        """
        body = self.backbone.model
        is_token = inputs.input_ids == self._reward
        with autocast(self.device, self.dtype):
            embeddings = body.get_input_embeddings()(inputs.input_ids.masked_fill(is_token, self._pad))  # [B, L, d]
            embeddings = torch.where(is_token[..., None], self.token.to(embeddings.dtype), embeddings)
            hidden = body(input_ids=inputs.input_ids, inputs_embeds=embeddings, position_ids=inputs.position_ids,
                          pixel_values=inputs.patches, image_grid_thw=inputs.grids, use_cache=False).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.head(hidden[rows, inputs.reward_at], keep)

    def _positions_of(self, height: int, width: int, length: int) -> Tensor:
        """The body's own rotary positions of a row with a picture of this grid: they do not depend on its text."""
        known = self._positions.get((height, width))
        if known is None or known.shape[1] < length:
            merge = self.backbone.config.vision_config.spatial_merge_size
            start, n = len(self._prefix), height * width // merge**2
            kinds = torch.zeros(1, max(length, start + n), dtype=torch.long)
            kinds[0, start:start + n] = 1  # 1 marks picture tokens
            known = self.backbone.model.get_rope_index(
                torch.zeros_like(kinds), kinds, image_grid_thw=torch.tensor([[1, height, width]]))[0][:, 0]
            self._positions[height, width] = known
        return known[:, :length]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _first_row(self, table: Tensor) -> Tensor:
        """Where the token's row starts: its own row where the vocabulary has it, else the mean of the table."""
        known = REWARD_TOKEN in self.tokenizer.get_vocab()
        if not known:
            self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        row = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        return (table[row] if known and row < len(table) else table.float().mean(0)).detach().float().clone()


def _fingerprint(backbone: nn.Module) -> str:
    """Tells one set of pre-trained weights from another, from a few of them, in the precision that all dtypes keep."""
    text, vision = backbone.model.language_model, backbone.model.visual
    digest = hashlib.sha256()
    for weight in (text.norm.weight, text.layers[0].input_layernorm.weight, text.layers[0].self_attn.q_proj.weight,
                   vision.blocks[0].attn.qkv.weight):
        digest.update(weight.detach().bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
