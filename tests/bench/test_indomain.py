"""The in-domain benchmark: figures against hand counts, pictures that stay, resume, and honest gaps."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
from PIL import Image

from spatialt2i.bench.indomain import VERSION, compare, measure, shares
from spatialt2i.bench.stats import mean_interval, paired_gain
from spatialt2i.core.config import BenchConfig
from spatialt2i.core.types import Benchmark, Prompt, Relation, Scores, Verdict

CONFIG = BenchConfig(bootstrap=200)
PROMPTS = [Prompt(f"p{i}", f"prompt {i}", "", (Relation("left of", "a", ("b",)), Relation("above", "b", ("a",))))
           for i in range(6)]


def verdict(left: bool | None, above: bool | None, clean: bool | None = True) -> Verdict:
    overall = None if None in (left, above, clean) else left and above and clean
    return Verdict(overall, (left, above), (True, True), clean, "test")


class Painter:
    """Draws a grey whose level is its seed, and counts its calls."""

    name = "painter"

    def __init__(self, fail_after: int | None = None) -> None:
        self.drawn, self.fail_after = 0, fail_after

    def generate(self, *, prompts, seeds):
        if self.fail_after is not None and self.drawn >= self.fail_after:
            raise KeyboardInterrupt
        self.drawn += len(prompts)
        return [Image.new("RGB", (8, 8), (seed % 256,) * 3) for seed in seeds]


class Judge:
    name = "judge"

    def verify(self, *, images, prompts):
        return [verdict(i.getpixel((0, 0))[0] % 2 == 0, True) for i in images]


class Level:
    name = "level"

    def score(self, *, images, prompts):
        return Scores(np.array([float(i.getpixel((0, 0))[0]) for i in images]))


def run_compare(folder, painter=None, identity="a", *, make=None, scorer=None, config=CONFIG):
    painter = painter or Painter()
    make = make or (lambda: painter)
    figures = compare(generators={"base": make, "tuned": make}, identities={"base": "base", "tuned": identity},
                      verifier=Judge(), scorer=scorer or Level(), prompts={"in_domain": PROMPTS}, config=config, seed=0,
                      folder=folder)
    return figures, painter


def benchmark(prompts):
    return Benchmark("in_domain", VERSION, tuple(prompts), Judge(), shares)


def test_figures_are_counted_by_hand():
    verdicts = [verdict(True, True), verdict(True, False), verdict(False, False), verdict(True, True, clean=False),
                verdict(None, True), verdict(True, True)]
    figures, right = measure(benchmark(PROMPTS), verdicts, config=CONFIG, seed=0)
    assert figures["all"] | {"lo": 0, "hi": 0} == {"value": 2 / 5, "lo": 0, "hi": 0, "n": 5}
    assert figures["coverage"] == 5 / 6
    assert figures["relations"]["value"] == pytest.approx((1 + 0.5 + 0 + 1 + 1 + 1) / 6)
    assert figures["clean"]["value"] == pytest.approx(5 / 6)
    assert figures["predicates"]["left of"]["value"] == pytest.approx(4 / 5)
    assert np.isnan(right[4]) and right[3] == 0


def test_prompts_are_the_units_whatever_they_have_of_a_predicate_and_of_pictures():
    """A prompt with three of a predicate, and two pictures of it, counts as much as one with a single one."""
    left = Relation("left of", "a", ("b",))
    prompts = [Prompt("p0", "many", "", (left, left, left)), Prompt("p1", "one", "", (left,))]
    verdicts = [Verdict(None, relations, (True,), True, "test")
                for relations in ((True, True, True), (True, True, False), (False,), (None,))]
    figures, right = measure(benchmark(prompts), verdicts, config=CONFIG, seed=0)
    assert figures["predicates"]["left of"]["value"] == pytest.approx((5 / 6 + 0) / 2)
    assert figures["predicates"]["left of"]["n"] == figures["relations"]["n"] == figures["all"]["n"] == 2
    assert right == [0.5, 0.0] and figures["coverage"] == 0.75


def test_the_reward_is_a_mean_over_prompts(tmp_path):
    class ByIndex:
        name = "by index"

        def score(self, *, images, prompts):
            return Scores(np.arange(len(images), dtype=float))

    figures, _ = run_compare(tmp_path, scorer=ByIndex(), config=BenchConfig(bootstrap=200, images_per_prompt=3))
    assert figures["spatialscore"]["base"]["n"] == len(PROMPTS)
    assert figures["spatialscore"]["base"]["value"] == pytest.approx(8.5)
    assert figures["in_domain"]["judge"] == "judge" and figures["in_domain"]["version"] == VERSION


def test_two_generators_are_never_in_memory_together(tmp_path):
    alive = weakref.WeakSet()

    def make():
        assert not alive, "the generator before is still there"
        alive.add(painter := Painter())
        return painter

    run_compare(tmp_path, make=make)


def test_pictures_stay_and_are_used_again(tmp_path):
    figures, painter = run_compare(tmp_path)
    assert painter.drawn == 12
    rows = [json.loads(line) for line in (tmp_path / "in_domain.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [p.text for p in PROMPTS]
    for row in rows:
        with Image.open(tmp_path / "base" / "in_domain" / f"{row['index']}.png") as image:
            assert image.getpixel((0, 0))[0] == row["seed"] % 256
    again, second = run_compare(tmp_path)
    assert second.drawn == 0 and again == figures


def test_damaged_or_foreign_pictures_are_drawn_again(tmp_path):
    run_compare(tmp_path)
    picture = tmp_path / "base" / "in_domain" / "3.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:20])
    assert run_compare(tmp_path)[1].drawn == 1 and picture.read_bytes() == whole
    assert run_compare(tmp_path, identity="another adapter")[1].drawn == 6


def test_an_interrupted_drawing_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("spatialt2i.bench.indomain.CHUNK", 2)
    with pytest.raises(KeyboardInterrupt):
        run_compare(tmp_path, Painter(fail_after=4))
    assert run_compare(tmp_path)[1].drawn == 8


def test_equal_generators_gain_nothing(tmp_path):
    figures, _ = run_compare(tmp_path)
    assert figures["in_domain"]["gain_all"] == {"value": 0.0, "lo": 0.0, "hi": 0.0, "n": 6}
    assert figures["in_domain"]["base"] == figures["in_domain"]["tuned"]


def test_intervals():
    draws = np.random.default_rng(0).random(400) < 0.3
    figure = mean_interval(draws.astype(float), resamples=2000, seed=0)
    half = 1.96 * np.sqrt(figure["value"] * (1 - figure["value"]) / 400)
    assert figure["lo"] == pytest.approx(figure["value"] - half, abs=0.01)
    assert figure["hi"] == pytest.approx(figure["value"] + half, abs=0.01)
    sure = mean_interval([1.0] * 50, resamples=200, seed=0)
    assert sure["hi"] == 1 and 0.9 < sure["lo"] < 1
    assert mean_interval([np.nan], resamples=200, seed=0) == {"value": None, "lo": None, "hi": None, "n": 0}
    gain = paired_gain([0, 0, np.nan, 1], [1, 1, 1, 1], resamples=200, seed=0)
    assert gain["n"] == 3 and gain["value"] == pytest.approx(2 / 3)
