"""One unit of work: a run of candidate pairs, computed by one process and stored as one set of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatialt2i.core.config import DataConfig
from spatialt2i.core.protocols import Generator, Verifier, Writer
from spatialt2i.core.run import file_hash, read_json, seed_of, write_json
from spatialt2i.core.store import write_jsonl, write_preferences
from spatialt2i.core.types import Prompt
from spatialt2i.data.stages import KEPT, PROMPT_DROPPED, draw_and_judge, perturb_prompts, write_prompts

Parts = Callable[[], tuple[Writer, Generator, Verifier]]
FILES = ("prompts/{}.jsonl", "pairs/{}.jsonl", "verdicts/{}.jsonl", "shards/{}.parquet")


@dataclass(frozen=True)
class Shard:
    """What a worker process is told.

    Attributes:
        number: position among the shards. start, stop: its candidate indices.
        config, seed: what the pairs depend on. identity: a hash of both; files of another one are stale.
        folder: where the files go. parts: makes the writer, the generator and the verifier.
    """

    number: int
    start: int
    stop: int
    config: DataConfig
    seed: int
    identity: str
    folder: Path
    parts: Parts

    def path(self, pattern: str) -> Path:
        """One of `FILES` of this shard."""
        return self.folder / pattern.format(f"{self.number:05d}")

    @property
    def manifest(self) -> Path:
        """The file that says that the others are complete; it is written last."""
        return self.path("shards/{}.json")


def make_shard(shard: Shard) -> dict[str, Any]:
    """Compute a shard, write its files, and return its manifest."""
    writer, generator, verifier = shard.parts()
    counts: Counter[str] = Counter()
    prompts, drops = write_prompts(writer, indices=range(shard.start, shard.stop), config=shard.config, seed=shard.seed)
    counts.update({f"{PROMPT_DROPPED}: {kind}": n for kind, n in drops.items()})
    pairs = perturb_prompts(writer, prompts, config=shard.config, seed=shard.seed)
    counts.update(why for why in pairs if isinstance(why, str))
    found, verdicts, kept = [p for p in pairs if not isinstance(p, str)], [], []
    for judged in draw_and_judge(generator, verifier, found, seed=shard.seed):
        counts[judged.outcome] += 1
        if judged.outcome == KEPT:
            kept.append(judged.preference)
        own = [v.to_json() for v in judged.preference.verdicts] if judged.preference else None
        verdicts.append({"id": judged.pair.perfect.id, "outcome": judged.outcome, "verdicts": own,
                         "under_the_other": judged.crossed})
    write_jsonl(shard.path(FILES[0]), [p.to_json() for p in prompts])
    write_jsonl(shard.path(FILES[1]), [{"id": p.perfect.id, "perturbed": p.perturbed.to_json(),
                                        "edits": [e.to_json() for e in p.edits]} for p in found])
    write_jsonl(shard.path(FILES[2]), verdicts)
    write_preferences(shard.path(FILES[3]), kept)
    manifest = {
        "identity": shard.identity, "counts": dict(sorted(counts.items())),
        "generator": {"name": generator.name, **generator.settings},
        "sha256": {pattern: file_hash(shard.path(pattern)) for pattern in FILES},
        "rows": [[scene_key(p.prompt), text_key(p.pair.perfect.text), text_key(p.pair.perturbed.text)] for p in kept],
    }
    write_json(shard.manifest, manifest)
    return manifest


def stored(shard: Shard) -> dict[str, Any] | None:
    """The manifest of a shard whose files are all there and whole, else None.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        manifest = read_json(shard.manifest)
        whole = manifest["identity"] == shard.identity and all(
            file_hash(shard.path(pattern)) == manifest["sha256"][pattern] for pattern in FILES)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing, cut off, or no manifest at all
        return None
    return manifest if whole else None


def scene_key(prompt: Prompt) -> int:
    """A hash of the place and the objects, which a pair's two prompts share; splits are made of whole keys."""
    return seed_of("scene", prompt.scene, *sorted(prompt.objects))


def text_key(text: str) -> int:
    """A hash of a prompt's text."""
    return seed_of("text", text)
