"""One unit of work: a run of candidate pairs, computed by one process and stored as one set of files.

Rows of pictures and verdicts say what they were made from (``by``), so that only those are made again that something
changed for.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spatialt2i.core.config import DataConfig
from spatialt2i.core.protocols import Generator, Verifier, Writer
from spatialt2i.core.run import file_hash, json_text, read_json, seed_of, write_json
from spatialt2i.core.store import CorruptData, append_jsonl, decode, read_jsonl, write_jsonl
from spatialt2i.core.types import Drawn, Pair, Preference, Prompt, Verdict
from spatialt2i.data.images import ImageStore
from spatialt2i.data.stages import NOT_DRAWN, PROMPT_DROPPED, draw_pairs, judge_pairs, perturb_prompts, write_prompts

STEPS = ("prompts", "pairs", "drawn", "verdicts")  # a file of JSON lines each
PHASES = {"drawn": STEPS[:3], "judged": STEPS}  # what must be there when a phase is over
_BATCH = 32  # pairs drawn or judged at a time, which is what a killed process may lose


class Parts:
    """Makes the writer, the generators and the verifier when they are wanted; each process has its own.

    Args:
        writer, verifier: make them. generators: make those who draw, by name. Picklable, all of them.
    """

    def __init__(self, *, writer: Callable[[], Writer], generators: dict[str, Callable[[], Generator]],
                 verifier: Callable[[], Verifier]) -> None:
        self._makers = {"writer": writer, "verifier": verifier, **{("drawn", n): g for n, g in generators.items()}}
        self._made: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_makers": self._makers, "_made": {}}

    def writer(self) -> Writer:
        """Who writes."""
        return self._one("writer")

    def verifier(self) -> Verifier:
        """Who judges."""
        return self._one("verifier")

    def generators(self, names: Sequence[str]) -> tuple[Generator, ...]:
        """Those who draw; others are let go of, because they may fill the memory."""
        for kept in [key for key in self._made if key[0] == "drawn" and key[1] not in names]:
            del self._made[kept]
        return tuple(self._one(("drawn", name)) for name in names)

    def _one(self, key: Any) -> Any:
        if key not in self._made:
            self._made[key] = self._makers[key]()
        return self._made[key]


@dataclass(frozen=True)
class Shard:
    """What a worker process is told.

    Attributes:
        number: position among the shards. start, stop: its candidate indices.
        config, seed: what the pairs depend on.
        drawn_by: names of those who draw the perfect and the perturbed prompts.
        identities: what its prompts, its pictures and its verdicts depend on; what was made from others is stale.
        folder: where the files go.
    """

    number: int
    start: int
    stop: int
    config: DataConfig
    seed: int
    drawn_by: tuple[str, str]
    identities: tuple[str, str, str]
    folder: Path

    def path(self, step: str) -> Path:
        """The file of one of `STEPS`."""
        return self.folder / step / f"{self.number:05d}.jsonl"

    def manifest(self, phase: str) -> Path:
        """The file that says that those of a phase are complete; it is written last."""
        return self.folder / "shards" / f"{self.number:05d}-{phase}.json"

    def made_from(self, phase: str) -> list[str]:
        """What the files of a phase depend on."""
        return list(self.identities[:2 if phase == "drawn" else 3])

    @property
    def images(self) -> ImageStore:
        """The pictures of all shards."""
        return ImageStore(self.folder / "images", format=self.config.image_format)


def draw_shard(shard: Shard, parts: Parts) -> None:
    """Write, perturb and draw the pairs of a shard, as far as that is not done."""
    counts: Counter[str] = Counter()
    prompts, drops = write_prompts(parts.writer(), indices=range(shard.start, shard.stop), config=shard.config,
                                   seed=shard.seed)
    counts.update({f"{PROMPT_DROPPED}: {kind}": n for kind, n in drops.items()})
    perturbed = perturb_prompts(parts.writer(), prompts, config=shard.config, seed=shard.seed)
    counts.update(why for why in perturbed if isinstance(why, str))
    pairs = [p for p in perturbed if not isinstance(p, str)]
    write_jsonl(shard.path("prompts"), [p.to_json() for p in prompts])
    write_jsonl(shard.path("pairs"), [{"id": p.perfect.id, "perturbed": p.perturbed.to_json(),
                                       "edits": [e.to_json() for e in p.edits]} for p in pairs])
    drawn = _draw(shard, parts, pairs)
    counts.update(f"{NOT_DRAWN}: {why}" for row in drawn.values() if (why := _why(row)))
    _finish(shard, "drawn", counts, {})


def judge_shard(shard: Shard, parts: Parts) -> None:
    """Judge the pictures of a shard that is drawn, as far as that is not done."""
    parts.generators(())  # they may fill the memory
    pairs, drawn = list(_pairs(shard)), {row["id"]: row for row in read_jsonl(shard.path("drawn"))}
    judged = _judge(shard, parts, [pair for pair in pairs if not _why(drawn[pair.perfect.id])], drawn)
    _finish(shard, "judged", Counter(read_json(shard.manifest("drawn"))["counts"]), {"pairs": [
        [scene_key(p.perfect), text_key(p.perfect.text), text_key(p.perturbed.text), _facts(judged.get(p.perfect.id))]
        for p in pairs]})


def _finish(shard: Shard, phase: str, counts: Counter[str], more: dict[str, Any]) -> None:
    """Write the file that says that a phase is complete."""
    write_json(shard.manifest(phase), {
        "made_from": shard.made_from(phase), "counts": dict(sorted(counts.items())),
        "sha256": {step: file_hash(shard.path(step)) for step in PHASES[phase]}, **more})


def stored(shard: Shard, phase: str) -> dict[str, Any] | None:
    """The manifest of a phase of a shard whose files are all there and whole, else None.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        manifest = read_json(shard.manifest(phase))
        whole = manifest["made_from"] == shard.made_from(phase) and all(
            file_hash(shard.path(step)) == manifest["sha256"][step] for step in PHASES[phase])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing, cut off, or no manifest at all
        return None
    return manifest if whole else None


def pictures_whole(shard: Shard) -> bool:
    """Whether all pictures of a shard are there and are what they were."""
    return all(_whole(shard.images, row) for row in read_jsonl(shard.path("drawn")))


def preferences(shard: Shard, wanted: Sequence[bool]) -> Iterator[Preference]:
    """The pairs of a finished shard, as far as they are wanted, with their pictures.

    Raises:
        CorruptData: a file is damaged, or a picture is damaged or missing.
    """
    drawn, judged = ({row["id"]: row for row in read_jsonl(shard.path(step))} for step in ("drawn", "verdicts"))
    for pair, want in zip(_pairs(shard), wanted, strict=True):
        if want:
            pictures, verdicts = drawn[pair.perfect.id]["pictures"], judged[pair.perfect.id]["verdicts"]
            chosen, rejected = (shard.images.read(p["image"]) for p in pictures)
            yield Preference(pair, chosen, rejected, tuple(Drawn(**p["by"]) for p in pictures),
                             tuple(map(Verdict.from_json, verdicts)))


def _pairs(shard: Shard) -> Iterator[Pair]:
    prompts = {row["id"]: row for row in read_jsonl(shard.path("prompts"))}
    return (Pair.from_json({**row, "perfect": prompts[row["id"]]}) for row in read_jsonl(shard.path("pairs")))


def _draw(shard: Shard, parts: Parts, pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """A row per pair: who drew its pictures, how, and their names in the store, or why there is none."""
    def work(part: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        both = draw_pairs(parts.generators(shard.drawn_by), shard.images, part, seed=shard.seed,
                          same_seed=shard.config.same_seed)
        for pictures in both:
            yield {"pictures": [{"by": asdict(p.by), "image": p.image, "why": p.why} for p in pictures]}

    made_from = {p.perfect.id: _hash(shard.identities[1], p.perfect.text, p.perturbed.text) for p in pairs}
    return _completed(shard.path("drawn"), pairs, made_from, work, functools.partial(_whole, shard.images))


def _whole(images: ImageStore, drawn: dict[str, Any]) -> bool:
    return all(images.has(p["image"]) for p in drawn["pictures"] if p["image"])


def _judge(shard: Shard, parts: Parts, pairs: Sequence[Pair],
           drawn: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A row per pair: the verdicts on both pictures, and whether each fits the other prompt too."""
    def work(part: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        images = [tuple(decode(shard.images.read(p["image"])) for p in drawn[pair.perfect.id]["pictures"])
                  for pair in part]
        for judgement in judge_pairs(parts.verifier(), part, images):
            yield {"verdicts": [v.to_json() for v in judgement.verdicts], "under_the_other": judgement.crossed}

    made_from = {p.perfect.id: _hash(shard.identities[2], json_text(p.to_json()),
                                     *(picture["image"] for picture in drawn[p.perfect.id]["pictures"]))
                 for p in pairs}
    return _completed(shard.path("verdicts"), pairs, made_from, work, lambda row: True)


def _completed(path: Path, pairs: Sequence[Pair], made_from: dict[str, str],
               work: Callable[[Sequence[Pair]], Iterator[dict[str, Any]]],
               whole: Callable[[dict[str, Any]], bool]) -> dict[str, dict[str, Any]]:
    """The rows of a file by id, in the order of the pairs; those that are missing, stale or not whole are made now."""
    rows = {row["id"]: row for row in _readable(path) if row.get("by") == made_from.get(row["id"]) and whole(row)}
    todo = [pair for pair in pairs if pair.perfect.id not in rows]
    for start in range(0, len(todo), _BATCH):
        part = todo[start:start + _BATCH]
        new = [{"id": pair.perfect.id, "by": made_from[pair.perfect.id], **row}
               for pair, row in zip(part, work(part), strict=True)]
        append_jsonl(path, *new)
        rows |= {row["id"]: row for row in new}
    ordered = {pair.perfect.id: rows[pair.perfect.id] for pair in pairs}
    write_jsonl(path, ordered.values())
    return ordered


def _readable(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as far as it is whole."""
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(read_jsonl(path))
    except (FileNotFoundError, CorruptData):  # what cannot be read is made again
        path.unlink(missing_ok=True)
    return rows


def _facts(judged: dict[str, Any] | None) -> list[list[bool | None]] | None:
    """What decides whether a pair is kept; None where it was not drawn."""
    return judged and [[v["overall"] for v in judged["verdicts"]], list(judged["under_the_other"])]


def _why(drawn: dict[str, Any]) -> str:
    return next((picture["why"] for picture in drawn["pictures"] if picture["why"]), "")


def _hash(*parts: str) -> str:
    return f"{seed_of(*parts):016x}"


def scene_key(prompt: Prompt) -> int:
    """A hash of the place and the objects, which a pair's two prompts share; splits are made of whole keys."""
    return seed_of("scene", prompt.scene, *sorted(prompt.objects))


def text_key(text: str) -> int:
    """A hash of a prompt's text."""
    return seed_of("text", text)
