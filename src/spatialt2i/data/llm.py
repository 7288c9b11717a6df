"""Lets a language model write prompts and perturb their relations (a `Writer`), and believes nothing unchecked.

What is asked for (scene, number of relations, number of edits) follows from seeds, so that the distribution of the set
is ours. Every reply is compared with what was asked; one that does not fit is sent back once with what is wrong with
it, then the prompt is dropped, and counted.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from spatialt2i.core.types import Edit, Pair, Prompt, Relation
from spatialt2i.data.consistency import MIDDLES, PREDICATES, contradiction
from spatialt2i.data.endpoint import AskError, Endpoint
from spatialt2i.data.perturb import DEPTH, OPPOSITE
from spatialt2i.data.stages import Dropped
from spatialt2i.data.vocabulary import scenes
from spatialt2i.data.wording import LONGEST, PHRASES, PRONOUNS, SHORTEST

T = TypeVar("T")
MOST_CHANGED = 16  # words that may differ for each edited relation, on either side
_FREE_WORDS = {
    *(w for phrases in PHRASES.values() for phrase in phrases for w in phrase.split()),
    *(w for phrase in PRONOUNS.values() for w in phrase.split()),
    "a", "an", "the", "is", "are", "and", "while", "which", "with", "edge", "edges", "side", "opposite", "other",
    "just", "directly", "immediately", "slightly", "aligned", "level", "line", "up", "down", "stands", "sits", "lies",
    "rests", "hangs", "placed", "positioned", "located", "leftmost", "rightmost", "nearest", "farthest"}
_RELATION = {
    "type": "object", "additionalProperties": False, "required": ["subject", "predicate", "objects"],
    "properties": {"subject": {"type": "string"}, "predicate": {"type": "string", "enum": list(PREDICATES)},
                   "objects": {"type": "array", "items": {"type": "string"}}}}
WRITING = {"name": "prompt", "schema": {
    "type": "object", "additionalProperties": False, "required": ["scene", "objects", "relations", "text"],
    "properties": {"scene": {"type": "string"}, "objects": {"type": "array", "items": {"type": "string"}},
                   "relations": {"type": "array", "items": _RELATION}, "text": {"type": "string"}}}}
PERTURBING = {"name": "perturbed", "schema": {
    "type": "object", "additionalProperties": False, "required": ["edits", "text"],
    "properties": {"text": {"type": "string"}, "edits": {"type": "array", "items": {
        "type": "object", "additionalProperties": False, "required": ["index", "relation", "dependent"],
        "properties": {"index": {"type": "integer"}, "relation": _RELATION, "dependent": {"type": "boolean"}}}}}}}
_PREDICATES_TOLD = (
    "A relation has a subject, a predicate and its objects: none for a place (at an edge, in a corner, against a wall, "
    "in the centre), two for 'between' and 'midway between', else one. Left, right, front and back are the viewer's.")
_WRITE = (
    "You describe scenes for photographs, so that everybody would arrange them alike. Write one description in plain, "
    f"natural English of {SHORTEST} to {LONGEST} words, best about 60. Start from one thing that is easy to find, then "
    "place every further thing by the ones that are there already. Every thing has a name of its own, with a colour, "
    "material or kind where that helps, and the text uses these names. State exactly the relations that you list, each "
    "once, none that follows from others, none that contradicts others. " + _PREDICATES_TOLD)
_PERTURB = (
    "You change where things are in a description, and nothing else. Replace exactly the number of relations asked for "
    "by others that cannot be true at the same time as what they replace: another side, front and back or two things "
    "exchanged, another place. Keep all things, their names and looks, and every other word of the text. Where another "
    "relation could not stay true beside the new ones, change that one as well and mark it as dependent. Name each "
    "changed relation by its index. " + _PREDICATES_TOLD)


class LLMWriter:
    """Prompts and edits by a chat model.

    Args:
        endpoint: where the model is. threads: requests at a time.
    """

    def __init__(self, endpoint: Endpoint, *, threads: int) -> None:
        self._endpoint, self.threads, self.bill = endpoint, threads, endpoint.bill

    def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
        """A prompt with that many relations, about a kind of place that the seed picks by the paper's shares.

        Raises:
            Dropped: the model gave no usable answer.
        """
        kinds = list(scenes().values())
        shares = np.array([scene.share for scene in kinds], dtype=np.float64)
        scene = kinds[int(np.random.default_rng(seed).choice(len(kinds), p=shares / shares.sum()))].name

        def read(answer: dict[str, Any]) -> Prompt:
            relations = tuple(_relation(r) for r in answer["relations"])
            return Prompt(id, " ".join(answer["text"].split()), scene, relations)

        ask = f"Scene: {scene}. Relations: exactly {n_relations}."
        return self._asked(_WRITE, ask, WRITING, seed, read, lambda prompt: faults_of_prompt(prompt, n_relations))

    def perturb(self, *, prompt: Prompt, n_edits: int, seed: int) -> Pair:
        """The prompt with ``n_edits`` other relations, and those that follow from them.

        Raises:
            Dropped: the model gave no usable answer.
        """
        def read(answer: dict[str, Any]) -> Pair:
            relations, edits = list(prompt.relations), []
            for found in sorted(answer["edits"], key=lambda e: e["index"]):
                if not 0 <= found["index"] < len(relations):
                    raise ValueError(f"there is no relation {found['index']}")
                before, after = prompt.relations[found["index"]], _relation(found["relation"])
                relations[found["index"]] = after
                edits.append(Edit(kind_of(before, after), found["index"], before, after, found["dependent"]))
            text = " ".join(answer["text"].split())
            return Pair(prompt, Prompt(f"{prompt.id}-p", text, prompt.scene, tuple(relations)), tuple(edits))

        told = "\n".join(f"{i}: {json.dumps(r.to_json())}" for i, r in enumerate(prompt.relations))
        ask = f"Change exactly {n_edits} of these relations.\n{told}\nThe text:\n{prompt.text}"
        return self._asked(_PERTURB, ask, PERTURBING, seed, read, lambda pair: faults_of_pair(pair, n_edits))

    def _asked(self, role: str, ask: str, schema: dict[str, Any], seed: int, read: Callable[[dict[str, Any]], T],
               faults: Callable[[T], list[str]]) -> T:
        """An answer without faults, after two tries at most."""
        messages = [{"role": "system", "content": role}, {"role": "user", "content": ask}]
        for _ in range(2):
            try:
                text = self._endpoint.ask(messages, schema=schema, seed=seed % 2**31)
            except AskError as error:
                raise Dropped(error.kind, str(error)) from error
            try:
                answer = read(json.loads(text))
                wrong = faults(answer)
            except json.JSONDecodeError as error:
                wrong = [f"not JSON: {error}"]
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                wrong = [f"not of the schema: {error}"]
            if not wrong:
                return answer
            messages += [{"role": "assistant", "content": text},
                         {"role": "user", "content": f"This does not fit: {'; '.join(wrong)}. Answer again, whole."}]
        raise Dropped(wrong[0].split(":")[0], f"no valid answer after two tries: {'; '.join(wrong)}")


def faults_of_prompt(prompt: Prompt, n_relations: int) -> list[str]:
    """What is wrong with a prompt; each begins with what to count it as, then a colon."""
    wrong = []
    words = len(prompt.text.split())
    if len(prompt.relations) != n_relations:
        wrong.append(f"number of relations: {len(prompt.relations)} are listed, {n_relations} were asked for")
    if not SHORTEST <= words <= LONGEST:
        wrong.append(f"length: {words} words, {SHORTEST} to {LONGEST} were asked for")
    wrong += _wrong_relations(prompt.relations)
    if absent := [name for name in prompt.objects if not _names(name).search(prompt.text)]:
        wrong.append(f"objects: the text does not name {', '.join(absent)}")
    return wrong


def faults_of_pair(pair: Pair, n_edits: int) -> list[str]:
    """What is wrong with a perturbed prompt; each begins with what to count it as, then a colon."""
    wrong = []
    indices = [e.index for e in pair.edits]
    if len(set(indices)) < len(indices):
        wrong.append("edits: a relation is changed twice")
    if any(e.before == e.after for e in pair.edits):
        wrong.append("edits: one changes nothing")
    if pair.n_perturbations != n_edits:
        wrong.append(f"number of edits: {pair.n_perturbations}, {n_edits} were asked for")
    wrong += _wrong_relations(pair.perturbed.relations)
    if set(pair.perturbed.objects) != set(pair.perfect.objects):
        wrong.append("objects: the things are others than before")
    return wrong + _wrong_words(pair)


def kind_of(before: Relation, after: Relation) -> str:
    """Which kind of edit turns one relation into the other."""
    if before.predicate == after.predicate:
        return "swap"
    if before.names == after.names and DEPTH.get(before.predicate) == after.predicate:
        return "depth"
    if before.names == after.names and OPPOSITE.get(before.predicate) == after.predicate:
        return "flip"
    return "move"


def _relation(value: dict[str, Any]) -> Relation:
    return Relation(str(value["predicate"]), str(value["subject"]), tuple(map(str, value["objects"])))


def _wrong_relations(relations: Sequence[Relation]) -> list[str]:
    said = Counter((r.predicate, r.subject, frozenset(r.objects) if r.predicate in MIDDLES else r.objects)
                   for r in relations)
    if repeated := next((key for key, n in said.items() if n > 1), None):
        return [f"relations: {repeated[1]} {repeated[0]} is listed twice"]
    problem = contradiction(relations)
    return [f"contradiction: {problem}"] if problem else []


def _wrong_words(pair: Pair) -> list[str]:
    """Words that changed though no relation's wording did."""
    before, after = (re.findall(r"[\w'-]+", p.text.lower()) for p in (pair.perfect, pair.perturbed))
    if before == after:
        return ["words: the text is the same"]
    free = _FREE_WORDS | {w for name in pair.perfect.objects for w in name.lower().split()}
    lost, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    if strange := sorted((set(lost) | set(new)) - free):
        return [f"words: others than those of relations changed: {', '.join(strange)}"]
    spans = [op for op in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes() if op[0] != "equal"]
    changed = sum(max(i1 - i0, j1 - j0) for _, i0, i1, j0, j1 in spans)
    if changed > MOST_CHANGED * len(pair.edits):
        return [f"words: {changed} changed for {len(pair.edits)} relations, the text was to be kept"]
    if absent := [n for n in pair.perfect.objects if not _names(n).search(pair.perturbed.text)]:
        return [f"objects: the text no longer names {', '.join(absent)}"]
    return []


def _names(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
