"""What the tiny Qwen2.5-VL is pre-trained on: statements about pictures judged in place, and descriptions in chat form.

No preference pair is ever made here: every picture stands alone. In half of the pictures objects are broken as a
generator breaks them (see tiny_qwen_spoil.py); what is said about a broken object is false.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from spatialt2i.core.run import progress, seed_of
from spatialt2i.core.types import Relation
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.painter import TinyPainter
from spatialt2i.tiny.phrases import render
from spatialt2i.tiny.world import (
    ARITY, COLOURS, MARGIN, MARGINS, OBJECTS, PREDICATES, SCENES, SIDES, SIZE, Box, Scene, margin,
)
from tiny_corpus import object_map
from tiny_qwen_spoil import Picture, spoil

BINS = 16  # coordinates are told in sixteenths of the canvas
MOST_CLAUSES = 9  # of a text that is judged
DESCRIBED = 0.2  # share of pictures that are described and asked about in chat form; the others are judged in place
ABSENT = 0.05  # share of statements about an object that is not in the picture
RELATIONS = np.array([0, 1, 503, 3348, 10572, 15572, 19054, 13829, 11056, 3430, 1428, 357], dtype=float)
_OFTEN = dict.fromkeys(SIDES, 3.0) | {"in front of": 5.0, "behind": 5.0}  # depth is the hardest to see
_WEIGHTS = np.array([_OFTEN.get(p, 1.5 if ARITY[p] > 1 else 0.4) for p in PREDICATES])


@dataclass(frozen=True)
class Batch:
    """B pictures with texts about them, and what is to be said where: N targets of a kind with their (row, position).

    Attributes:
        images: uint8 [B, 64, 64, 3].
        input_ids: int64 [B, L], padded on the right.
        judged: int64 [N, 4], row, position, 1 for true or 0 for false, predicate.
        tallied: int64 [N, 3], row, position, how many clauses of a text after "judge" were false up to there.
        spoken: int64 [N, 3], row, position, id of the next token of an answer.
        mentions: int64 [N, 5], row, position of an object's name, its x and y, and whether it covers part of another
            object (1), is covered (2), or neither (0).
        seen: int64 [N, 5], row, visual token that holds one object's centre, and the same of that object.
        related: int64 [N, 6], row, position, x and y of the clause's other object, x and y of their difference.
        cells: float32 [B, visual tokens, objects], which objects have their centre there.
        map: int64 [B, visual tokens, points], what is visible at points four pixels apart: 1 + position in `OBJECTS`,
            0 for nothing, -100 (not asked) where something broken is.
    """

    images: np.ndarray
    input_ids: np.ndarray
    judged: np.ndarray
    tallied: np.ndarray
    spoken: np.ndarray
    mentions: np.ndarray
    seen: np.ndarray
    related: np.ndarray
    cells: np.ndarray
    map: np.ndarray


def layouts(n: int, *, seed: int, split: str) -> list[Scene]:
    """Scenes as the prompts of the world lead to them; pictures of one layout differ in colours, light and place."""
    writer, painter, found = TinyWriter(), TinyPainter(wrong_layout=0), []
    for i in progress(range(n), desc=f"{split} layouts"):
        rng = np.random.default_rng(seed_of(seed, "tiny-qwen", split, i))
        n_relations = int(rng.choice(len(RELATIONS), p=RELATIONS / RELATIONS.sum())) + 1
        prompt = writer.write(id=f"{split}-{i}", n_relations=n_relations, seed=int(rng.integers(2**62)))
        found.append(painter.scene(prompt=prompt, seed=int(rng.integers(2**62))))
    return found


def varied(scene: Scene, rng: np.random.Generator) -> Scene:
    """The layout with its colours permuted, mirrored half of the time, in a random place."""
    colours = dict(zip(COLOURS, rng.permutation(list(COLOURS)).tolist(), strict=True))
    mirrored = rng.random() < 0.5
    boxes = {f"{colours[c]} {s}": Box(SIZE - b.cx if mirrored else b.cx, b.cy, b.r, b.z)
             for (c, s), b in ((name.split(), box) for name, box in scene.boxes.items())}
    return Scene(list(SCENES)[int(rng.integers(len(SCENES)))], boxes)


def truths(scene: Scene) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each predicate, which tuples of object numbers clearly satisfy it, and which clearly do not."""
    boxes = list(scene.boxes.values())
    cx, cy, r = (np.array([getattr(b, k) for b in boxes]) for k in ("cx", "cy", "r"))
    n, same = len(boxes), np.eye(len(boxes), dtype=bool)
    nearer = np.array([[a.z > b.z for b in boxes] for a in boxes])
    found = {}
    for p in PREDICATES:
        arity = ARITY[p]
        shapes = [tuple(-1 if i == axis else 1 for i in range(arity)) for axis in range(arity)]
        # depth is a scalar of a box, so the object in front is given 1 and the pairs of other depths are masked
        z = {"in front of": (1, 0), "behind": (0, 1)}.get(p, (0, 0, 0))
        margins = np.broadcast_to(MARGINS[p](*(Box(cx.reshape(s), cy.reshape(s), r.reshape(s), d)
                                               for s, d in zip(shapes, z, strict=False))), (n,) * arity)
        distinct = np.ones((n,) * arity, dtype=bool)
        if arity == 2:
            distinct = ~same
        elif arity == 3:
            distinct = ~(same[:, :, None] | same[:, None, :] | same[None])
        holds, fails = margins >= MARGIN, margins <= -MARGIN
        if p in ("in front of", "behind"):
            order = nearer if p == "in front of" else nearer.T
            holds, fails = holds & order, fails | ~order
        found[p] = (np.argwhere(holds & distinct), np.argwhere(fails & distinct))
    return found


def statements(scene: Scene, n: int, rng: np.random.Generator, true_share: float = 0.5,
               broken: frozenset[str] = frozenset()) -> list[tuple[Relation, bool]]:
    """n relations, a share of them true; half of the false ones are true ones with their objects exchanged.

    What would be true of a broken object is false.
    """
    names, facts, found = list(scene.boxes), truths(scene), []
    while len(found) < n:
        p = PREDICATES[int(rng.choice(len(PREDICATES), p=_WEIGHTS / _WEIGHTS.sum()))]
        true = bool(rng.random() < true_share)
        exchange = not true and ARITY[p] == 2 and p != "next to" and rng.random() < 0.5
        options = facts[p][0 if true or exchange else 1]
        if not len(options):
            continue
        index = options[int(rng.integers(len(options)))].tolist()
        who = [names[i] for i in (index[::-1] if exchange else index)]
        if not true and rng.random() < 2 * ABSENT:
            others = [o for o in OBJECTS if o not in scene.boxes]
            who[int(rng.integers(len(who)))] = others[int(rng.integers(len(others)))]
        found.append((Relation(p, who[0], tuple(who[1:])), true and broken.isdisjoint(who)))
    return found


def whereabouts(scene: Scene) -> dict[str, tuple[int, int, int]]:
    """Of each object its x and y, and whether it covers part of another (1), is covered (2), or neither (0)."""
    depth = dict.fromkeys(scene.boxes, 0)
    for a, box in scene.boxes.items():
        for b, other in scene.boxes.items():
            if box.z > other.z and margin(Relation("in front of", a, (b,)), scene.boxes) > 0:
                depth[a], depth[b] = 1, 2
    return {name: (*_bins(box.cx, box.cy), depth[name]) for name, box in scene.boxes.items()}


def visible(scene: Scene, grid: int, untold: np.ndarray) -> np.ndarray:
    """What is visible at points four pixels apart, by the visual token that holds them: int64 [grid^2, points].

    Args:
        untold: bool [64, 64], pixels that are not told (-100).
    """
    shown = object_map(scene).astype(np.int64)
    shown[untold[2::4, 2::4]] = -100
    side = len(shown) // grid
    return shown.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid**2, side**2)


class Tasks:
    """Makes batches from layouts.

    Args:
        scenes: from `layouts`. tokenizer: of the tiny models. grid: visual tokens along a side.
        seed, split: name the draws.
    """

    def __init__(self, scenes: list[Scene], *, tokenizer: PreTrainedTokenizerBase, grid: int, seed: int,
                 split: str) -> None:
        self.scenes, self.tokenizer, self.grid, self.seed, self.split = scenes, tokenizer, grid, seed, split
        vocabulary = tokenizer.get_vocab()
        self.objects = np.full(len(vocabulary), -1)
        self.objects[[vocabulary[o] for o in OBJECTS]] = np.arange(len(OBJECTS))
        self.ids = vocabulary
        self.head = [*self._tokens("<|im_start|>user\n<|vision_start|>"), *[vocabulary["<|image_pad|>"]] * grid**2,
                     vocabulary["<|vision_end|>"]]
        self.picture_at = self.head.index(vocabulary["<|image_pad|>"])
        self.answer = self._tokens("<|im_end|>\n<|im_start|>assistant\n")

    def batch(self, step: int, size: int) -> Batch:
        """The batch of one update; the same arguments always give the same batch."""
        rng = np.random.default_rng(seed_of(self.seed, "tiny-qwen", self.split, "batch", step))
        images = np.empty((size, SIZE, SIZE, 3), dtype=np.uint8)
        cells = np.zeros((size, self.grid**2, len(OBJECTS)), dtype=np.float32)
        widths = {"judged": 4, "tallied": 3, "spoken": 3, "mentions": 5, "seen": 5, "related": 6}
        found: dict[str, list[tuple[int, ...]]] = {k: [] for k in widths}
        shown = np.empty((size, self.grid**2, (SIZE // 4 // self.grid)**2), dtype=np.int64)
        n, rows = int(rng.integers(2, MOST_CLAUSES + 1)), []
        for row in range(size):
            scene = varied(self.scenes[int(rng.integers(len(self.scenes)))], rng)
            picture = spoil(scene, rng)
            images[row] = picture.pixels
            shown[row], where = visible(scene, self.grid, picture.touched), whereabouts(scene)
            for name in picture.broken:
                where.pop(name)
            self._look(row, scene, where, cells, found)
            chat = row < round(DESCRIBED * size)
            ids = (self._chat(row, scene, picture, found, rng) if chat
                   else self._judge(row, scene, picture, n, found, rng))
            for at, token in enumerate(ids):
                name = OBJECTS[self.objects[token]] if self.objects[token] >= 0 else None
                if name in where:
                    found["mentions"].append((row, at, *where[name]))
            rows.append(ids)
        longest = max(len(ids) for ids in rows)
        input_ids = np.array([ids + [self.tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows])
        arrays = {k: np.array(v, dtype=np.int64).reshape(-1, widths[k]) for k, v in found.items()}
        return Batch(images=images, input_ids=input_ids, cells=cells, map=shown, **arrays)

    def _look(self, row: int, scene: Scene, where: dict[str, tuple[int, int, int]], cells: np.ndarray,
              found: dict) -> None:
        at: dict[int, list[str]] = {}
        for name in where:
            b = scene.boxes[name]
            cell = int(b.cy * self.grid / SIZE) * self.grid + int(b.cx * self.grid / SIZE)
            cells[row, cell, OBJECTS.index(name)] = 1
            at.setdefault(cell, []).append(name)
        for cell, names in at.items():
            if len(names) == 1:
                found["seen"].append((row, self.picture_at + cell, *where[names[0]]))

    def _judge(self, row: int, scene: Scene, picture: Picture, n: int, found: dict,
               rng: np.random.Generator) -> list[int]:
        """A text of n clauses as prompts have them; the truth of each is asked for at its last token.

        Half of the texts follow the word "judge" and are answered with the number of false clauses, and one more where
        litter lies about.
        """
        counted, mostly_true = (rng.random(2) < 0.5).tolist()
        facts = statements(scene, n, rng, true_share=0.85 if mostly_true else 0.5, broken=picture.broken)
        clauses = render(scene.place, [fact for fact, _ in facts], int(rng.integers(2**62))).split(". ")
        ids = [*self.head, self.ids["judge"]] if counted else list(self.head)
        wrong = int(picture.litter)
        for clause, (fact, true) in zip(clauses, facts, strict=True):
            ids += self._tokens(clause)
            self._state(row, len(ids) - 1, ids, scene, picture, fact, true, found)
            wrong += not true
            if counted:
                found["tallied"].append((row, len(ids) - 1, wrong))
        return self._say(row, ids + self.answer, [self.ids[str(wrong)]], found) if counted else ids

    def _state(self, row: int, at: int, ids: list[int], scene: Scene, picture: Picture, fact: Relation, true: bool,
               found: dict) -> None:
        found["judged"].append((row, at, int(true), PREDICATES.index(fact.predicate)))
        if fact.objects and all(name in scene.boxes and name not in picture.broken for name in fact.names):
            a, b = scene.boxes[fact.subject], scene.boxes[fact.objects[-1]]
            here = OBJECTS[self.objects[ids[at]]]
            other = a if here != fact.subject else b
            apart = int((a.cx - b.cx + SIZE) * BINS / (2 * SIZE)), int((a.cy - b.cy + SIZE) * BINS / (2 * SIZE))
            found["related"].append((row, at, *_bins(other.cx, other.cy), *apart))

    def _chat(self, row: int, scene: Scene, picture: Picture, found: dict, rng: np.random.Generator) -> list[int]:
        """"describe": every whole object from left to right with its place; then a few statements, one turn each."""
        ids = [*self.head, self.ids["describe"], *self.answer]
        said = []
        for name, box in sorted(scene.boxes.items(), key=lambda item: item[1].cx):
            if name in picture.broken:
                continue
            x, y = _bins(box.cx, box.cy)
            said += [self.ids[name], self.ids[str(x)], self.ids[str(y)]]
        ids = self._say(row, ids, said, found)
        for fact, true in statements(scene, 2, rng, broken=picture.broken):
            clause = render(scene.place, [fact], int(rng.integers(2**62)))
            ids += [*self._tokens("<|im_start|>user\n"), *self._tokens(clause)]
            self._state(row, len(ids) - 1, ids, scene, picture, fact, true, found)
            ids = self._say(row, ids + self.answer, [self.ids["yes" if true else "no"]], found)
        return ids

    def _say(self, row: int, ids: list[int], said: list[int], found: dict) -> list[int]:
        said = [*said, self.ids["<|im_end|>"]]
        found["spoken"] += [(row, len(ids) - 1 + i, token) for i, token in enumerate(said)]
        return ids + said

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _bins(x: float, y: float) -> tuple[int, int]:
    return int(x * BINS / SIZE), int(y * BINS / SIZE)
