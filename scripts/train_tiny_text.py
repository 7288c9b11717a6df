"""Teach tiny-flux's T5 encoder what prompts say of places, before any picture is drawn.

    python scripts/train_tiny_text.py --corpus build/corpus --out build/tiny-flux --steps 1200

FLUX gives its text tokens no positions, so that only the T5 encoder can tell "a left of b" from "b left of a". It does
so by its relative position biases, which in flow matching hardly move. Here every mention of an object predicts where
its object is, and every two mentions predict the offset of their objects and which of them is in front where they
overlap; minutes are enough. `train_tiny_flux.py flow` goes on teaching this next to the pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel

from _checkpoint import load_state, make_optimizers, save_state, tensor, use_machine
from spatialt2i.core.run import progress
from spatialt2i.core.store import append_jsonl
from spatialt2i.tiny.tokenizer import CLIP_LENGTH, make_tokenizer
from spatialt2i.tiny.world import OBJECTS, SIZE

WIDTH, HEADS, PAIR_WIDTH = 128, 4, 32
CELLS = 8  # places are told on a grid of 8 x 8
OFFSETS = (-0.45, -0.33, -0.22, -0.12, -0.04, 0.04, 0.12, 0.22, 0.33, 0.45)  # bin edges, picture widths
CLEARLY = 0.12  # objects further apart than this are on different sides
NEIGHBOURS = ((-1,), (1,), (-2, 2), ())  # tokens that each head attends to at the start
LR_BIAS = 3e-2  # a bias must move by several units where other weights move by hundredths


def make_text_encoder() -> T5EncoderModel:
    """A T5 encoder of 4 layers, most of whose heads begin by looking at neighbours."""
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(make_tokenizer(max_length=CLIP_LENGTH)), d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=256,
        num_layers=4, num_heads=HEADS, dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0,
        eos_token_id=1))
    attention = t5.encoder.block[0].layer[0].SelfAttention  # all layers share its biases
    half = attention.relative_attention_num_buckets // 2
    with torch.no_grad():
        for head, offsets in enumerate(NEIGHBOURS):
            for offset in offsets:
                attention.relative_attention_bias.weight[(half if offset > 0 else 0) + abs(offset), head] += 4
    return t5


class Places(nn.Module):
    """Heads that are thrown away: from the text alone, the place of a mention, the offset and the depth of two."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = (len(OFFSETS) + 1, len(OFFSETS) + 1, 3)  # classes: offset along x, along y, depth
        logits = sum(self.shapes)
        self.place = nn.Linear(WIDTH, CELLS**2)
        self.subject, self.other = nn.Linear(WIDTH, logits), nn.Linear(WIDTH, logits)
        self.query, self.key = nn.Linear(WIDTH, logits * PAIR_WIDTH), nn.Linear(WIDTH, PAIR_WIDTH)
        tokenizer = make_tokenizer(max_length=CLIP_LENGTH)
        object_of = torch.full((len(tokenizer),), -1)  # which object a token mentions
        for i, name in enumerate(OBJECTS):
            object_of[tokenizer(name).input_ids[0]] = i
        self.register_buffer("object_of", object_of, persistent=False)
        self.register_buffer("edges", torch.tensor(OFFSETS), persistent=False)

    def forward(self, hidden: Tensor, words: Tensor, boxes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the shares of clear offsets and of overlaps whose order is told rightly.

        Args:
            hidden: [B, L, WIDTH], the encoder's states. words: int64 [B, L].
            boxes: float32 [B, 7, 5], as the corpus has them.
        """
        named = self.object_of[words][..., None]  # [B, L, 1]
        match = (named == boxes[:, None, :, 0]) & (named >= 0)  # [B, L, 7]
        mention = match.any(-1)
        box = boxes[..., 1:].gather(1, match.int().argmax(-1)[..., None].expand(-1, -1, 4))  # [B, L, 4]
        column, row = (box[mention][:, :2] / SIZE * CELLS).long().clamp(0, CELLS - 1).unbind(-1)
        place = F.cross_entropy(self.place(hidden[mention]).float(), row * CELLS + column)
        pairs = mention[:, :, None] & mention[:, None, :] & (named != named.transpose(1, 2))
        b, i, j = pairs.nonzero(as_tuple=True)
        query = self.query(hidden[b, i]).unflatten(1, (-1, PAIR_WIDTH))
        logits = (query * self.key(hidden[b, j])[:, None]).sum(-1) + self.subject(hidden[b, i])
        logits = (logits + self.other(hidden[b, j])).float().split(self.shapes, dim=1)
        one, two = box[b, i], box[b, j]  # [M, 4]
        offset = (one - two)[:, :2] / SIZE
        reach = (one + two)[:, 2] / SIZE - 1 / SIZE
        depth = torch.where(offset.abs().amax(1) < reach, 1 + (one[:, 3] > two[:, 3]).long(), 0)  # apart, behind, front
        goals = (*torch.bucketize(offset, self.edges).unbind(1), depth)
        losses = sum(F.cross_entropy(x, y, reduction="none") for x, y in zip(logits, goals, strict=True))
        weight = 1 / pairs.sum((1, 2))[b]  # every text counts the same
        half = len(OFFSETS) // 2
        chance = torch.stack(logits[:2], 1).detach().softmax(-1)  # [M, 2, bins]
        side = chance[..., half + 1:].sum(-1) > chance[..., :half].sum(-1)
        found = {"side": (side == (offset > 0))[offset.abs() > CLEARLY].float().mean(),
                 "depth": ((logits[2][:, 2] > logits[2][:, 1]) == (depth == 2))[depth > 0].float().mean()}
        return 0.3 * place + (losses * weight).sum() / weight.sum() / 2, found


class Reader(nn.Module):
    """The encoder with its `Places`."""

    def __init__(self) -> None:
        super().__init__()
        self.t5, self.places = make_text_encoder(), Places()


def main() -> None:
    """Train, and write the encoder to ``OUT/text``; goes on where an earlier call was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--lr-matrices", type=float, default=7e-3, help="peak learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    use_machine(device=args.device, threads=args.threads)
    torch.manual_seed(args.seed)
    boxes, tokens = np.load(args.corpus / "boxes.npy"), np.load(args.corpus / "tokens.npy", mmap_mode="r")
    model = Reader()
    biases = [p for n, p in model.named_parameters() if "relative_attention_bias" in n]
    optimizers = make_optimizers(model, lr=args.lr, lr_matrices=args.lr_matrices, without=biases)
    optimizers.append(torch.optim.AdamW(biases, lr=LR_BIAS, betas=(0.9, 0.99), weight_decay=0))
    state = args.out / "text_state.safetensors"
    start = load_state(state, module=model, average={}, optimizers=optimizers)
    for step in progress(range(start, args.steps), desc="text", total=args.steps, initial=start):
        rng = np.random.default_rng((args.seed, step))
        pick = rng.integers(len(tokens), size=args.batch)
        words = tensor(tokens[pick, rng.integers(tokens.shape[1], size=args.batch)].astype(np.int64))
        hidden = model.t5(words).last_hidden_state
        loss, found = model.places(hidden, words, tensor(boxes[pick].astype(np.float32)))
        loss.backward()
        rate = min(1, (step + 1) / 100) * (1 - step / args.steps)
        for optimizer, peak in zip(optimizers, (args.lr, args.lr_matrices, LR_BIAS), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            values = {"loss": loss, **found}
            append_jsonl(args.out / "text.jsonl", {"step": step, **{k: v.item() for k, v in values.items()}})
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            save_state(state, step=step + 1, module=model, average={}, optimizers=optimizers)
    model.t5.save_pretrained(args.out / "text")


if __name__ == "__main__":
    main()
