"""The report of a run: its figures, its page, and what both do where something is missing, strange or broken."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report_parts import EVIL, STAGES, make_run, png
from spatialt2i.build import stages
from spatialt2i.core.run import RunDir
from spatialt2i.core.store import CorruptData
from spatialt2i.report import curves, dataset, figures, gallery, pictures, plots
from spatialt2i.report.compare import compare
from spatialt2i.report.page import write_report

VOID = {"meta", "link", "img", "br", "path", "use"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    made = make_run(tmp_path_factory.mktemp("runs") / "full")
    write_report(run=made)
    return made


@pytest.fixture(scope="module")
def html(run: RunDir) -> str:
    return (run.path / "report.html").read_text(encoding="utf-8")


# ---- report.json

def test_the_figures_have_the_agreed_keys(run: RunDir) -> None:
    found = json.loads((run.path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found.keys() == {"seed", "cost", "tables", "reward", "rl", "versions"} and found["seed"] == 3
    assert found["reward"].keys() == {"accuracy"}
    assert found["reward"]["accuracy"].keys() == {"one", "two_three", "overall"}
    assert found["rl"].keys() == {"in_domain", "hard", "spatialscore"}
    scores = found["rl"]["spatialscore"]
    assert scores.keys() == {"base", "tuned", "intervals"} and (scores["base"], scores["tuned"]) == (0.1, 0.6)
    assert {model: scores["intervals"][model]["value"] for model in ("base", "tuned")} == {"base": 0.1, "tuned": 0.6}
    for name in ("in_domain", "hard"):
        compared = found["rl"][name]
        assert compared.keys() == {"base", "tuned", "intervals", "gain_all", "judge", "version"}
        assert compared["gain_all"].keys() == {"value", "lo", "hi", "n"}
        assert compared["base"] == {"relations": 0.5, "all": 0.3, "presence": 0.9, "clean": None, "coverage": 0.5}
        assert compared["tuned"] == compared["base"] | {"all": 0.6}
        for model in ("base", "tuned"):
            intervals = compared["intervals"][model]
            assert intervals.keys() == {"relations", "all", "presence", "clean"}
            assert all(figure.keys() == {"value", "lo", "hi", "n"} for figure in intervals.values())
            assert {m: figure["value"] for m, figure in intervals.items()} | {"coverage": 0.5} == compared[model]
    assert found["cost"] == {stage: {"seconds": 12.5 * i, "peak_mb": 500.0} for i, stage in enumerate(STAGES, 1)}
    assert found["tables"].keys() == {"reward", "rl"} and found["tables"]["reward"].keys() == {"predicates", "edits"}
    assert found["tables"]["rl"]["hard"]["left of"]["tuned"]["value"] == 0.7
    assert "python" in found["versions"]


def test_what_was_not_judged_is_never_zero(run: RunDir, html: str) -> None:
    found = json.loads((run.path / "report.json").read_text())
    unknown = {"value": None, "lo": None, "hi": None, "n": 0}
    assert found["reward"]["accuracy"]["two_three"] == unknown
    assert found["rl"]["hard"]["base"]["clean"] is None and found["rl"]["hard"]["intervals"]["base"]["clean"] == unknown
    assert found["tables"]["reward"]["edits"]["swap"] == unknown
    assert "two or three –" in Page(html).text
    assert figures.percent(None) == figures.points(None) == figures.number(None) == "–"
    assert figures.between(unknown) == "not judged"


def test_the_written_figures_are_returned(run: RunDir) -> None:
    assert write_report(run=run) == json.loads((run.path / "report.json").read_text())


@pytest.mark.parametrize("absent", STAGES)
def test_a_stage_that_is_not_finished_is_absent_and_named(absent: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", tuple(s for s in STAGES if s != absent))
    found = write_report(run=run)
    assert absent not in found["cost"] and len(found["cost"]) == 4
    assert ("reward" in found) == (absent != "reward_eval") and ("rl" in found) == (absent != "bench")
    text = Page((run.path / "report.html").read_text()).text
    assert f"spatialt2i {figures.COMMANDS[absent]} --run {run.path}" in text


def test_an_empty_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ())
    found = write_report(run=run)
    assert found == {"seed": 3, "cost": {}, "tables": {}, "versions": {}}
    text = Page((run.path / "report.html").read_text()).text
    assert all(f"spatialt2i {command} --run {run.path}" in text for command in figures.COMMANDS.values())
    assert "not measured" in figures.report_card(found, "runs/x") and "0.0%" not in text


def test_an_unfinished_stage_shows_its_curves_and_its_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ("data", "reward", "rl"))
    (run.path / "rl" / "manifest.json").unlink()
    write_report(run=run)
    text = Page((run.path / "report.html").read_text()).text
    assert "Seconds per step" in text and "The rest of Spatial-RL" in text and "rl train" in text


def test_versions_of_stages_that_differ_are_all_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ("data", "reward"))
    path = run.path / "reward" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["numpy"] = "9.9"
    path.write_text(json.dumps(manifest))
    assert figures.collect(run)["versions"]["numpy"].endswith(", 9.9")


# ---- report.html

def test_the_page_is_whole_and_asks_nothing_of_the_network(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!doctype html>") and not [tag for tag, *_ in page.attributes if tag == "script"]
    unread = re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)  # the settings, as text
    assert len(unread) < len(html) and not re.search("https?://|@import", unread)
    asked = page.values("src", "href", "xlink:href", "data", "poster", "srcset", "action")
    assert asked and all(value.startswith(("data:", "#")) for value in asked)
    assert "url(" not in html.replace("url(#", "")


def test_every_link_finds_its_place_and_no_id_is_there_twice(html: str) -> None:
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href", "xlink:href") if value.startswith("#")} <= set(ids)


def test_every_picture_and_plot_says_what_it_is(html: str) -> None:
    page = Page(html)
    alts = page.values("alt")
    assert len(alts) == sum(tag == "img" and name == "src" for tag, name, _ in page.attributes) > 20
    assert all(alts) and html.count("<svg") == html.count('<svg class="plot" role="img" aria-label="') > 10


def test_what_looks_like_html_in_the_data_stays_text(html: str) -> None:
    assert "<script" not in html and "<b>lawn" not in html
    text = Page(html).text
    assert EVIL in text and "<b>lawn</b>" in text


def test_the_page_shows_every_part(html: str) -> None:
    text = Page(html).text
    for part in ("Pairs ranked right", "Reward", "KL to the base model", "Clip share", "Loss", "Relations per prompt",
                 "What became of the pairs", "Mean 18.3.", "red circle left of blue square", "misplaced by 3.0 pixels",
                 "flip: red circle left of blue square → red circle right of blue square", "data build", "[reward]",
                 "spatialt2i all --preset config.toml", "prompts that became worse",
                 "Judged by oracle-7", "pictures that could be judged", "60.0% [50.0 to 70.0]"):
        assert part in text, part
    assert "<mark>left</mark>" in html and "<mark>right</mark>" in html
    assert 'aria-label="not judged"' in html and 'class="small"' in html


def test_the_same_folder_gives_the_same_bytes(run: RunDir, tmp_path: Path) -> None:
    before = {name: (run.path / name).read_bytes() for name in ("report.html", "report.json")}
    write_report(run=run)
    assert before == {name: (run.path / name).read_bytes() for name in before}


def test_a_missing_picture_is_named_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ("bench",))
    picture = run.path / "eval" / "base" / "hard" / "0.png"
    picture.unlink()
    write_report(run=run)
    assert "picture missing" in (run.path / "report.html").read_text()
    picture.write_bytes(b"\x89PNG\r\n\x1a\n half")
    with pytest.raises(pictures.BrokenPicture, match=r"hard/0\.png: the picture cannot be decoded"):
        write_report(run=run)


def test_a_corrupt_record_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ("bench",))
    (run.path / "eval" / "hard.jsonl").write_text("{\n")
    with pytest.raises(CorruptData, match=r"hard\.jsonl, line 1: not JSON"):
        write_report(run=run)


def test_pictures_of_which_only_one_side_was_judged_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ("bench",))
    (run.path / "eval" / "tuned" / "hard_verdicts.jsonl").unlink()
    titles = [shown["title"] for shown in gallery.before_after(run)]
    assert titles == ["In-domain prompts", "In-domain prompts that became worse"]


# ---- pieces

def test_the_card_is_a_few_lines_that_end_with_the_page(run: RunDir) -> None:
    card = figures.report_card(json.loads((run.path / "report.json").read_text()), "runs/x")
    assert card.splitlines()[0] == "Report card of runs/x, seed 3" and card.endswith("  runs/x/report.html\n")
    assert "30.0% -> 60.0%, gain +30.0 points (+20.0 to +40.0), 40 prompts" in card and "nan" not in card.lower()


@pytest.mark.parametrize(("seconds", "text"), [
    (3.21, "3.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (370, "6 min 10 s"), (3599.6, "1 h 00 min"),
    (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


def test_negative_numbers_have_a_minus() -> None:
    assert figures.points(-0.0312) == "−3.1" and figures.number(-0.5) == "−0.5"


@pytest.mark.parametrize(("before", "after", "marked"), [
    ("a is left of b", "a is right of b", (["left"], ["right"])),
    ("the red cat, the dog", "the dog, the red cat", None),
    ("same", "same", ([], [])),
    ("on top of b", "next to b", (["on top of"], ["next to"])),
])
def test_changed_words(before: str, after: str, marked: tuple[list[str], list[str]] | None) -> None:
    sides = pictures.changed_words(before, after)
    assert ["".join(text for text, _ in side) for side in sides] == [before, after]
    if marked is not None:
        assert tuple([text for text, changed in side if changed] for side in sides) == marked


def test_large_pictures_become_smaller_and_small_ones_stay_as_they_are() -> None:
    small, large = pictures.embed(png(0), where="x"), pictures.embed(png(0, 600), where="x")
    assert small.small and small.uri.startswith("data:image/png;base64,")
    assert not large.small and large.uri.startswith("data:image/jpeg;base64,") and len(large.uri) < 200_000


def test_a_gap_in_a_metric_stays_a_gap() -> None:
    x, y = curves.series([{"step": 0, "kl": 1.0}, {"step": 1, "kl": None}, {"step": 2}], "kl")
    assert x == [0, 1] and y[0] == 1.0 and math.isnan(y[1])
    assert curves.running_mean([1.0, math.nan, 3.0], 2) == [1.0, 1.0, 3.0]
    assert math.isnan(curves.running_mean([math.nan], 1)[0])
    assert curves.draw("x", [{"step": 0, "kl": None}], curves.RL_PLOTS) == []


def test_numbers_are_counted_in_bins_without_gaps() -> None:
    assert dataset.binned({"2": 1, "4": 2}, 1) == {"2": 1, "3": 0, "4": 2}
    assert dataset.binned({"4": 1, "12": 2, "13": 3}, 5) == {"0–4": 1, "5–9": 0, "10–14": 5}


def test_plots_take_the_pages_colours() -> None:
    svg = str(plots.bars("b", ["x & <y>"], [3], alt='say "x"', sideways=True))
    assert 'aria-label="say &quot;x&quot;"' in svg and "x &amp; &lt;y&gt;" in svg
    assert "currentColor" in svg and "var(--s1)" in svg and "#" not in re.sub(r"url\(#|href=\"#|&#", "", svg) and svg.endswith("</svg>")


# ---- several runs

def test_runs_are_compared_on_one_page(tmp_path: Path, run: RunDir) -> None:
    other = make_run(tmp_path / "other", ("rl",), seed=4)
    found = compare([run, other], tmp_path / "compare.html")
    assert found.keys() == {"full", "other"} and found["other"]["settings"] == {"seed": "4"}
    assert found["full"]["steps"] == 4 and found["full"]["seconds_update"] == pytest.approx(2.15)
    assert found["full"]["update_share"] == 1.0 and found["full"]["reward"] == pytest.approx(0.15)
    assert found["full"]["gain_all"]["hard"]["value"] == 0.3 and found["other"]["gain_all"] is None
    html = (tmp_path / "compare.html").read_text()
    assert "seed = 4" in Page(html).text and "http" not in html and html.count("<svg") == 2


def test_the_stage_compares_on_request_and_has_a_card(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", ("rl",))
    assert "compare" not in stages.report(run.config, run) and not (run.path / "compare.html").exists()
    assert stages.report(run.config, run, beside=[other.path])["compare"].keys() == {"a", "b"}
    assert "compare" not in json.loads((run.path / "report.json").read_text()) and (run.path / "compare.html").exists()
    assert stages.report_card(run).endswith(f"  {run.path}/report.html\n")


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(ValueError, match="expected two to 6 folders"):
        compare([run], tmp_path / "c.html")
    with pytest.raises(ValueError, match=r"no step of Spatial-RL yet; run `spatialt2i rl train"):
        compare([run, make_run(tmp_path / "empty", ())], tmp_path / "c.html")
    twin = tmp_path / "full"
    shutil.copytree(run.path, twin)
    with pytest.raises(ValueError, match="different names"):
        compare([run, RunDir(twin, run.config)], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()
