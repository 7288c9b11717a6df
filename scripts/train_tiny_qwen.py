"""Pre-trains the tiny Qwen2.5-VL from scratch on describing pictures of the tiny world and judging statements.

    python scripts/train_tiny_qwen.py --out src/spatialt2i/tiny/weights/tiny-qwen2.5-vl --work build/qwen

Every clause of a text is judged where it ends, so one picture asks many questions at the cost of one. Helpers that are
thrown away make it fast: the place and depth of each named object is read off its mention (and off the visual token
where it stands), the offset of a clause's two objects off the clause's end, how many clauses were false so far there
too, and what a visual token shows, point by point and by name, off the vision tower. Runs stop and resume at any point.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from _checkpoint import load_state, make_optimizers, save_state, tensor, use_machine
from spatialt2i.core.device import autocast
from spatialt2i.core.run import atomic_path, file_hash, progress, tree_hash, versions, write_json
from spatialt2i.core.store import append_jsonl
from spatialt2i.reward.pixels import PixelReader
from spatialt2i.tiny.qwen import MERGE, PATCH, make_tiny_qwen
from spatialt2i.tiny.tokenizer import make_tokenizer
from spatialt2i.tiny.world import OBJECTS, PREDICATES, SIZE
from tiny_qwen_tasks import BINS, MOST_CLAUSES, Batch, Tasks, layouts

SEEN, MENTIONED, RELATED = 1, 2, 3  # layers of the language model whose output the helpers read
GRID = SIZE // (PATCH * MERGE)  # visual tokens along a side
SHIPPED_VAE = Path(__file__).parent.parent / "src" / "spatialt2i" / "tiny" / "weights" / "tiny-flux" / "vae"
REPAINTED = 0.3  # share of pictures that went through the autoencoder, as everything that tiny-flux draws does


class Lesson(nn.Module):
    """The model with its helpers, and the losses of a batch."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, *, tasks: Tasks, reader: PixelReader) -> None:
        super().__init__()
        self.model, self.reader = model, reader
        width = model.config.text_config.hidden_size
        self.place = nn.Linear(width, 3 * BINS)  # x, y, depth
        self.relation = nn.Linear(width, 4 * BINS)
        self.map = nn.Linear(width, (64 // 4 // tasks.grid)**2 * (len(OBJECTS) + 1))
        self.cell_scale, self.cell_bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), -3.0))
        self.tally = nn.Linear(width, MOST_CLAUSES + 2)  # nothing false up to everything, and litter
        self.objects = torch.tensor([tasks.ids[o] for o in OBJECTS])
        self.yes_no = torch.tensor([tasks.ids["no"], tasks.ids["yes"]])
        self.picture_at, self.grid = tasks.picture_at, tasks.grid
        self.seen: dict[int | str, Tensor] = {}
        for i, layer in enumerate(model.model.language_model.layers):
            layer.register_forward_hook(lambda module, args, out, i=i: self.seen.__setitem__(i, out))
        vision = model.model.visual
        vision.register_forward_hook(lambda module, args, out: self.seen.__setitem__("v", out.pooler_output))

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, and float32 [N], whether each statement was judged rightly."""
        t = {name: tensor(a) for name, a in vars(batch).items() if name not in ("images", "input_ids")}
        ids, model = tensor(batch.input_ids), self.model.model
        with torch.device("cpu"):
            patches, grids = (made.to(ids.device) for made in self.reader(list(batch.images)))
        kinds = torch.zeros(1, ids.shape[1], dtype=torch.long)
        kinds[0, self.picture_at:self.picture_at + self.grid**2] = 1
        positions = model.get_rope_index(torch.zeros_like(kinds), kinds, image_grid_thw=grids[:1])[0]
        positions = positions.expand(3, *ids.shape)
        last = model(input_ids=ids, position_ids=positions, pixel_values=patches, image_grid_thw=grids,
                     use_cache=False).last_hidden_state
        norm, words = model.language_model.norm, self.model.lm_head
        early = norm(self.seen[len(model.language_model.layers) - 2])
        verdicts, early_verdicts = (words(h[*t["judged"].T[:2]])[:, self.yes_no].float() for h in (last, early))
        said = words(last[*t["spoken"].T[:2]]).float()
        judged = words(last[*t["judged"].T[:2]]).float()
        cells = norm(self.seen["v"]) @ words.weight[self.objects].T * self.cell_scale + self.cell_bias
        shown = self.map(self.seen["v"]).float().view(-1, len(OBJECTS) + 1)
        true = t["judged"][:, 2]
        losses = {
            "judged": F.cross_entropy(judged, self.yes_no[true]),
            "early": 0.5 * F.cross_entropy(early_verdicts, true),
            "tallied": F.cross_entropy(self.tally(last[*t["tallied"].T[:2]]).float(), t["tallied"][:, 2]),
            "spoken": 0.3 * F.cross_entropy(said, t["spoken"][:, 2]),
            "mentions": 0.5 * self._place(t["mentions"], MENTIONED),
            "seen": 0.5 * self._place(t["seen"], SEEN),
            "related": 0.25 * self._bins(self.relation(self.seen[RELATED][*t["related"].T[:2]]), t["related"][:, 2:]),
            "map": F.cross_entropy(shown, t["map"].flatten()),
            "cells": F.binary_cross_entropy_with_logits(cells.float().view_as(t["cells"]), t["cells"]) * len(OBJECTS),
        }
        return losses, (verdicts.argmax(1) == true).float()

    def _place(self, targets: Tensor, layer: int) -> Tensor:
        return self._bins(self.place(self.seen[layer][*targets.T[:2]]), targets[:, 2:])

    def _bins(self, logits: Tensor, targets: Tensor) -> Tensor:
        groups = logits.float().split(BINS, dim=1)
        return sum(F.cross_entropy(g, targets[:, i]) for i, g in enumerate(groups))


def faster_dtype() -> torch.dtype:
    """bfloat16 on a GPU, and where this CPU multiplies matrices in it at least half again as fast; else float32."""
    if torch.get_default_device().type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(4096, 128, dtype=dtype), torch.ones(128, 384, dtype=dtype)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) / 1.5 else torch.float32


def judge(lesson: Lesson, tasks: Tasks, *, batches: int, size: int) -> dict[str, float | dict[str, float]]:
    """Share of statements about held-out pictures judged rightly, overall and by predicate, in float32."""
    right: dict[int, list[float]] = {}
    losses: dict[str, list[float]] = {}
    lesson.eval()
    for i in range(batches):
        batch = tasks.batch(i, size)
        with torch.inference_mode():
            found, correct = lesson(batch)
        for predicate, value in zip(batch.judged[:, 3].tolist(), correct.tolist(), strict=True):
            right.setdefault(predicate, []).append(value)
        for name, value in found.items():
            losses.setdefault(name, []).append(value.item())
    lesson.train()
    everything = [v for values in right.values() for v in values]
    return {"accuracy": float(np.mean(everything)), "statements": len(everything),
            "predicates": {PREDICATES[p]: round(float(np.mean(v)), 4) for p, v in sorted(right.items())},
            "losses": {name: round(float(np.mean(v)), 4) for name, v in losses.items()}}


def averaged(lesson: Lesson, average: dict[str, Tensor]) -> None:
    """Put the averaged weights into the model."""
    lesson.load_state_dict({k: average[k].clone() for k in lesson.state_dict()})


def repaint(vae: AutoencoderKL, images: np.ndarray, seed: int) -> None:
    """Put the last pictures of uint8 [B, 64, 64, 3] through the autoencoder, its latents a little disturbed."""
    some = images[-round(REPAINTED * len(images)):]
    x = tensor(some).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(z)
        y = vae.decode(z + 0.1 * z.std() * noise).sample
    some[:] = ((y.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--work", type=Path, required=True, help="where the state of the training is kept")
    parser.add_argument("--vae", type=Path, default=SHIPPED_VAE, help="the autoencoder's folder")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--lr-matrices", type=float, default=3e-3, help="peak learning rate of Muon")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--layouts", type=int, default=8000)
    parser.add_argument("--average", type=float, default=0.998, help="decay of the averaged weights that are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; start again to go on")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return parser.parse_args()


def main() -> None:
    """Train, or go on training, and write the folder with its manifest."""
    args = arguments()
    device = use_machine(device=args.device, threads=args.threads)
    dtype = faster_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    args.work.mkdir(parents=True, exist_ok=True)
    start = args.work / "start"
    tokenizer = make_tokenizer(max_length=512)
    make_tiny_qwen(start, tokenizer=tokenizer, seed=args.seed)
    # eager: the backward pass of the CPU's attention kernel is slow in bfloat16, plain products are not
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, attn_implementation="eager")
    reader = PixelReader(Qwen2VLImageProcessorPil.from_pretrained(start), max_pixels=64 * 64)
    sets = {split: Tasks(layouts(n, seed=args.seed, split=split), tokenizer=tokenizer, grid=GRID, seed=args.seed,
                         split=split) for split, n in {"train": args.layouts, "held-out": 1000}.items()}
    torch.manual_seed(args.seed)
    lesson = Lesson(model, tasks=sets["train"], reader=reader).to(device).train()
    optimizers = make_optimizers(lesson, lr=args.lr, lr_matrices=args.lr_matrices)
    vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32).to(device).eval()
    average = {k: v.clone() for k, v in lesson.state_dict().items()}
    state = args.work / "state.safetensors"
    first = load_state(state, module=lesson, average=average, optimizers=optimizers)
    began, bar = time.monotonic(), progress(args.steps, desc="tiny-qwen", initial=first)
    for step in range(first, args.steps):
        rate = min(1, (step + 1) / args.warmup) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / args.steps)))
        batch = sets["train"].batch(step, args.batch)
        with autocast(torch.get_default_device(), dtype):
            repaint(vae, batch.images, step)
            losses, right = lesson(batch)
        total = sum(losses.values())
        if not torch.isfinite(total):
            sys.exit(f"update {step}: the loss is {total.item()}; lower --lr and start again from {state}")
        lesson.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(lesson.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (args.lr, args.lr_matrices), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
        decay = min(args.average, step / (step + 10))
        for k, v in lesson.state_dict().items():
            average[k].lerp_(v, 1 - decay)
        done, late = step + 1, time.monotonic() - began > 60 * args.minutes
        if done % args.eval_every == 0:
            kept = {k: v.clone() for k, v in lesson.state_dict().items()}
            averaged(lesson, average)
            append_jsonl(args.work / "metrics.jsonl", {"step": done, "seconds": time.monotonic() - began,
                                                       **judge(lesson, sets["held-out"], batches=4, size=args.batch)})
            lesson.load_state_dict(kept)
        if done % args.save_every == 0 or done == args.steps or late:
            save_state(state, step=done, module=lesson, average=average, optimizers=optimizers)
        bar.set_postfix(right=f"{right.mean():.3f}", **{k: f"{v:.2f}" for k, v in losses.items()}, refresh=False)
        bar.update()
        if late:
            return
    bar.close()
    averaged(lesson, average)
    found = judge(lesson, sets["held-out"], batches=40, size=args.batch)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "work", "vae", "minutes", "threads", "device")}
    options = shlex.join(f"--{k.replace('_', '-')}={v}" for k, v in settings.items())
    with atomic_path(args.out) as target:
        make_tiny_qwen(target, tokenizer=tokenizer, seed=args.seed)
        model.save_pretrained(target)
        write_json(target / "manifest.json", {
            "command": f"python scripts/train_tiny_qwen.py --out OUT --work WORK {options}",
            "seed": args.seed, "config": settings, "autoencoder_sha256": tree_hash(args.vae),
            "dtype": str(dtype), "parameters": sum(p.numel() for p in model.parameters()),
            "sha256": file_hash(target / "model.safetensors"),
            "data_sha256": hashlib.sha256(repr(sets["train"].scenes).encode()).hexdigest(), "metrics": found,
            "versions": versions()})


if __name__ == "__main__":
    main()
