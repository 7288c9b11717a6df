"""Measure a FLUX pipeline folder on held-out prompts of the tiny world, with the stock class and the oracle.

    python scripts/check_tiny_flux.py build/tiny-flux/pipeline --prompts 200 --steps 16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from spatialt2i.bench.indomain import VERSION, measure, shares
from spatialt2i.core.config import BenchConfig
from spatialt2i.core.run import json_text, seed_of
from spatialt2i.core.types import Benchmark
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.oracle import TinyOracle

TEXT_TOKENS = 40


def main() -> None:
    """Print the benchmark's figures with their intervals, also by predicate, as JSON; optionally save a sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--relations", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--cfg", type=float, default=1.0, help="true classifier-free guidance")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = FluxPipeline.from_pretrained(args.folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    writer, oracle = TinyWriter(), TinyOracle()
    prompts = tuple(writer.write(id=f"check-{args.seed}-{i}", n_relations=args.relations[i % len(args.relations)],
                                 seed=seed_of(args.seed, "check", i)) for i in range(args.prompts))
    images = []
    for i in range(0, len(prompts), args.batch):
        texts = [p.text for p in prompts[i:i + args.batch]]
        extra = {"negative_prompt": [""] * len(texts), "true_cfg_scale": args.cfg} if args.cfg != 1 else {}
        images += pipeline(prompt=texts, height=64, width=64, num_inference_steps=args.steps,
                           guidance_scale=args.guidance, max_sequence_length=TEXT_TOKENS,
                           generator=torch.Generator().manual_seed(args.seed + i), **extra).images
    figures, _ = measure(Benchmark("check", VERSION, prompts, oracle, shares),
                         oracle.verify(images=images, prompts=prompts), config=BenchConfig(), seed=args.seed)
    if args.sheet:
        tiles = np.stack([np.asarray(i) for i in images[:50]])
        Image.fromarray(np.concatenate([np.concatenate(list(tiles[r:r + 10]), 1) for r in range(0, 50, 10)])).resize(
            (1280, 640), Image.Resampling.NEAREST).save(args.sheet)
    sys.stdout.write(json_text(figures | {"steps": args.steps, "seed": args.seed}))


if __name__ == "__main__":
    main()
