"""Make the weights that the package ships again: pictures, tiny-flux, tiny-qwen2.5-vl, in this order.

    python scripts/tiny_weights.py --work build

Every part keeps its state under ``--work`` and goes on from there after an interruption. The finished folders are
copied to ``src/spatialt2i/tiny/weights`` together with a manifest each: commands, seed, sizes, hash of the training
data, and what the model measures on held-out prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from spatialt2i.core.run import atomic_path, file_hash, read_json, versions, write_json

SCRIPTS = Path(__file__).parent
SHIPPED = SCRIPTS.parent / "src" / "spatialt2i" / "tiny" / "weights"
# glibc returns every large buffer to the system and faults it in again, which is much of the time of CPU training
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def run(script: str, *args: str | Path) -> str:
    """Run one of our scripts to its end and return what it printed; its progress goes to standard error."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    done = subprocess.run(command, env=KEEP_MEMORY | os.environ, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def data_hash(corpus: Path) -> str:
    """SHA-256 of the training pictures, object maps and captions."""
    return hashlib.sha256("".join(file_hash(path) for path in sorted(corpus.glob("*.npy"))).encode()).hexdigest()


def install(folder: Path, name: str, manifest: dict) -> None:
    """Copy a finished model to where the package ships it."""
    with atomic_path(SHIPPED / name) as target:
        shutil.copytree(folder, target)
        write_json(target / "manifest.json", manifest)


def main() -> None:
    """Make both models, or those of them that ``--only`` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--only", choices=("tiny-flux", "tiny-qwen2.5-vl"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    corpus, wrong = args.work / "corpus", args.work / "corpus-scrambled"
    flux, touched, detailed, misled = (args.work / f"tiny-flux{part}"
                                       for part in ("", "-touching", "-detailed", "-misled"))
    qwen = args.work / "tiny-qwen2.5-vl"
    machine = ("--device", args.device, "--threads", args.threads)
    if args.only != "tiny-qwen2.5-vl":
        clear = ("--layouts", "12")
        parts = [("tiny_corpus.py", "--out", corpus, "--count", "80000", *clear, "--workers", args.threads)]
        parts += [(*script, "--corpus", corpus, "--out", flux, "--steps", steps, "--batch", batch, *machine)
                  for script, steps, batch in (
                       (("train_tiny_flux.py", "vae", "--touching", 0.6), 4500, 16),
                       (("train_tiny_text.py",), 1200, 128), (("train_tiny_flux.py", "flow"), 11_000, 64))]
        gently = ("--lr", "7e-4", "--lr-matrices", "1.4e-3", "--touching", 0.6)
        # what is learnt last, shown more often; then at all noise levels; then captions that are mostly wrong, after
        # which it places things badly
        parts += [("tiny_corpus.py", "--out", wrong, "--count", "8000", "--scramble", "0.7", *clear,
                   "--workers", args.threads)]
        parts += [("train_tiny_flux.py", "flow", "--start", start / "flow_state.safetensors", "--corpus", pictures,
                   "--out", out, "--steps", steps, "--batch", 64, "--guide-from", 0, *settings, *machine)
                  for start, pictures, out, steps, settings in (
                      (flux, corpus, touched, 4600, gently),
                      (touched, corpus, detailed, 3000, (*gently, "--low", 0.65)),
                      (detailed, wrong, misled, 240, ("--lr", "2e-3", "--lora-rank", 16, "--touching", 0.4)))]
        checks = {n: ("check_tiny_flux.py", misled / "pipeline", "--prompts", 400, "--seed", 1, "--relations",
                      *n.split("-"), "--threads", args.threads) for n in ("2-3", "4-5-6-7")}
        for part in parts:
            run(*part)
        held_out = {n: json.loads(run(*check)) for n, check in checks.items()}
        install(misled / "pipeline", "tiny-flux", {
            "commands": ["python scripts/" + shlex.join(map(str, p)) for p in (*parts, *checks.values())], "seed": 0,
            "corpus": read_json(corpus / "manifest.json"), "corpus_sha256": data_hash(corpus),
            "held_out_by_relations": held_out, "versions": versions()})
    if args.only != "tiny-flux":
        run("train_tiny_qwen.py", "--out", SHIPPED / "tiny-qwen2.5-vl", "--work", qwen, *machine)


if __name__ == "__main__":
    main()
