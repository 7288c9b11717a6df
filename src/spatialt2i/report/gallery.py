"""The pictures of a run: base against tuned, the same prompts over RL steps, and preference pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from spatialt2i.core.run import RunDir, read_json
from spatialt2i.core.store import read_jsonl, read_preferences
from spatialt2i.core.types import Edit, Preference, Prompt, Relation, Verdict
from spatialt2i.report.figures import MODELS, SETS
from spatialt2i.report.pictures import changed_words, embed, read_picture

FIRST, WORSE = 12, 6  # samples of each set: the first ones, and some that became worse
STEPS = 12  # columns of the gallery over steps
PAIRS = 6


@dataclass(frozen=True)
class Sample:
    """One evaluated prompt: its number in the set, and what the judge says of each model's picture."""

    index: int
    prompt: Prompt
    verdicts: dict[str, Verdict]

    @property
    def became_worse(self) -> bool:
        """Whether the base picture was all right and the tuned one is not."""
        return self.verdicts["base"].overall is True and self.verdicts["tuned"].overall is False


def before_after(run: RunDir) -> list[dict[str, Any]]:
    """Per set the first samples, then some that became worse; empty where nothing was evaluated.

    Raises:
        CorruptData, BrokenPicture: a file of the run cannot be read.
    """
    shown = []
    for name, title in SETS.items():
        samples = read_samples(run, name)
        worse = [sample for sample in samples[FIRST:] if sample.became_worse][:WORSE]
        for heading, some in ((f"{title} prompts", samples[:FIRST]), (f"{title} prompts that became worse", worse)):
            if some:
                shown.append({"title": heading, "samples": [_shown(run, name, sample) for sample in some]})
    return shown


def read_samples(run: RunDir, name: str) -> list[Sample]:
    """The judged prompts of a set; none where not both models were judged."""
    folder = run.path / "eval"
    paths = [folder / f"{name}.jsonl", *(folder / model / f"{name}_verdicts.jsonl" for model in MODELS)]
    if not all(path.exists() for path in paths):
        return []
    samples = []
    for row, *verdicts in zip(*map(read_jsonl, paths), strict=True):
        prompt = Prompt(row["id"], row["prompt"], "", tuple(Relation.from_json(r) for r in row["relations"]))
        samples.append(Sample(row["index"], prompt, dict(zip(MODELS, map(Verdict.from_json, verdicts), strict=True))))
    return samples


def over_steps(run: RunDir) -> list[dict[str, Any]]:
    """Per prompt of the RL gallery its text and (step, picture) of about `STEPS` steps, evenly spaced, and the last."""
    folders = sorted((run.path / "rl" / "gallery").glob("step_*/prompts.json"))
    if not folders:
        return []
    stride = math.ceil(len(folders) / STEPS)
    chosen = [*folders[:-1:stride], folders[-1]]
    steps = [(int(path.parent.name.removeprefix("step_")), path.parent) for path in chosen]
    prompts = [Prompt.from_json(value) for value in read_json(folders[0])]
    return [{"text": prompt.text, "pictures": [(step, read_picture(folder / f"{i:02d}.png")) for step, folder in steps]}
            for i, prompt in enumerate(prompts)]


def preference_pairs(run: RunDir) -> list[dict[str, Any]]:
    """The first pairs of the test split, with what differs between the two prompts; empty where there are none."""
    shards = sorted((run.path / "data").rglob("test-*.parquet"))
    return [show_pair(pair) for pair in itertools.islice(read_preferences(shards), PAIRS)]


def in_words(relation: Relation) -> str:
    """A relation as a reader would say it: ``red circle left of blue square``."""
    return " ".join([relation.subject, relation.predicate, " and ".join(relation.objects)]).rstrip()


def _shown(run: RunDir, name: str, sample: Sample) -> dict[str, Any]:
    """A sample with both pictures, and each thing that was asked for with what the judge says of it."""
    texts = [*map(in_words, sample.prompt.relations), "nothing else in the picture"]
    judged = {model: [*verdict.relations, verdict.clean] for model, verdict in sample.verdicts.items()}
    return {"text": sample.prompt.text,
            "reasons": [r for model in MODELS for r in _reasons(model, sample.prompt, sample.verdicts[model])],
            "checks": [{"text": text, **{model: judged[model][i] for model in MODELS}} for i, text in enumerate(texts)],
            **{model: {"picture": read_picture(run.path / "eval" / model / name / f"{sample.index}.png"),
                       "overall": sample.verdicts[model].overall} for model in MODELS}}


def _reasons(model: str, prompt: Prompt, verdict: Verdict) -> list[str]:
    """Why relations do not hold and what was not asked for, where the judge's evidence says so."""
    given = verdict.evidence.get("reasons") or []
    reasons = [f"{model}, {in_words(relation)}: {reason}"
               for relation, reason in zip(prompt.relations, given, strict=False) if reason]
    unasked = verdict.evidence.get("unasked") or []
    return reasons + ([f"{model}, not asked for: {', '.join(unasked)}"] if unasked else [])


def show_pair(row: Preference) -> dict[str, Any]:
    """A pair with both pictures, what differs between its prompts, and its edits."""
    perfect, perturbed = row.pair.perfect, row.pair.perturbed
    pieces = changed_words(perfect.text, perturbed.text)
    return {"edits": [_edit(edit) for edit in row.pair.edits],
            "chosen": {"text": perfect.text, "pieces": pieces[0],
                       "picture": embed(row.chosen, where=f"pair {perfect.id}, chosen")},
            "rejected": {"text": perturbed.text, "pieces": pieces[1],
                         "picture": embed(row.rejected, where=f"pair {perfect.id}, rejected")}}


def _edit(edit: Edit) -> str:
    follows = ", follows from another edit" if edit.dependent else ""
    return f"{edit.kind}: {in_words(edit.before)} → {in_words(edit.after)}{follows}"
