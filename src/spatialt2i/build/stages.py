"""The stages: each takes the config and the run, and returns its figures, JSON-able.

Rooms are imported inside the functions, so that a stage needs only its own extra.
"""

from __future__ import annotations

import dataclasses
import shutil
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spatialt2i import __version__
from spatialt2i.build import parts
from spatialt2i.core.config import RULES, Config, ConfigError, load_config
from spatialt2i.core.device import describe_machine, measured, pick_device
from spatialt2i.core.run import (
    RunDir,
    RunError,
    atomic_path,
    json_text,
    lasting,
    progress,
    read_json,
    seed_of,
    tree_hash,
)
from spatialt2i.core.store import read_image, read_preferences
from spatialt2i.core.types import Prompt


# ---- stages ----------------------------------------------------------------------------------------------------------

def data_build(config: Config, run: RunDir) -> dict[str, Any]:
    """Part 1: the dataset of verified pairs, under ``data/``."""
    if (manifest := run.manifest("data")) and "imported" in manifest["figures"]:
        return manifest["figures"]  # others' preferences stand in for ours
    settings = _data_settings(config)
    key = f"{seed_of(_key(config, 'data'), *settings.values()):016x}"
    return _stage(run, "data", key, lambda: _build_data(config, run, settings), outputs=(
        "data/data", "data/statistics.json"))


def data_generate(config: Config, run: RunDir) -> dict[str, Any]:
    """Part 1 up to the pictures."""
    with measured(run.stage("data") / "cost.json"):  # `data_build` adds to it
        return _build_data(config, run, _data_settings(config), until="drawn")


def data_verify(config: Config, run: RunDir) -> dict[str, Any]:
    """Part 1 up to the verdicts."""
    with measured(run.stage("data") / "cost.json"):
        return _build_data(config, run, _data_settings(config), until="judged")


def _data_settings(config: Config) -> dict[str, str]:
    return {name: parts.settings_of(config, name) for name in (*config.data.generators, config.data.verifier)}


def _build_data(config: Config, run: RunDir, settings: dict[str, str], until: str = "published") -> dict[str, Any]:
    from spatialt2i.data.pipeline import build_dataset
    alone = config.data.engine == "local" and any(settings.values())  # one process, as it may hold a large model
    data = dataclasses.replace(config.data, workers=config.data.workers or int(alone))
    return build_dataset(
        config=data, seed=config.seed, folder=run.stage("data"), settings_of=settings, until=until,
        parts=parts.data_parts(config, run.stage("data")),
        exclude=frozenset(p.text for prompts in parts.bench_prompts(config).values() for p in prompts))


def data_publish(config: Config, run: RunDir, *, webdataset: bool) -> dict[str, Any]:
    """`data_build`; also as WebDataset shards, under ``data/webdataset/``."""
    figures = data_build(config, run)
    if webdataset:
        from spatialt2i.data.sharing import write_webdataset
        found = [path for split in ("train", "validation", "test") if figures["counts"][split]
                 for path in shards(run, split)]
        figures = {**figures, "webdataset": write_webdataset(found, run.path / "data" / "webdataset")}
    return figures


def data_push(config: Config, run: RunDir | None, *, repo: str, private: bool) -> dict[str, Any]:
    """Upload the run's dataset to a hub."""
    if run is None:
        raise ValueError("which dataset? Give --run a run that has one")
    _needs(run, "data", "data build")
    from spatialt2i.data.sharing import push
    return push(run.path / "data", repo, private=private)


def data_import(config: Config, run: RunDir, *, source: Path, format: str) -> dict[str, Any]:
    """Part 1 by others: their preferences, under ``data/``, for part 2."""
    from spatialt2i.data.imports import import_preferences
    return _stage(run, "data", f"{format} {source.resolve()}", lambda: import_preferences(
        source, format=format, config=config.data, folder=run.stage("data")), outputs=("data/data",))


def data_inspect(config: Config, run: RunDir | None, *, dataset: Path | None, split: str, count: int,
                 predicate: str | None, edit: str | None, out: Path | None, show: bool, draw: int) -> dict[str, Any]:
    """A page of pairs of a run, or of any dataset's folder, to leaf through."""
    from spatialt2i.report.inspect import write_inspection
    if (run is None) == (dataset is None):
        raise ValueError("which pairs? Give --run a run, or --dataset a folder with parquet files")
    found = shards(run, split) if run else sorted(dataset.rglob(f"{split}-*.parquet"))
    page = out or (run.path if run else dataset) / "pairs.html"
    figures = write_inspection(found, page, count=count, seed=draw, predicate=predicate, edit=edit)
    if show:
        webbrowser.open(page.resolve().as_uri())
    return figures


def data_prompts(config: Config, run: RunDir | None, *, out: Path) -> dict[str, Any]:
    """Prompts alone, as JSON lines in ``out``."""
    from spatialt2i.data.files import write_prompt_file
    return write_prompt_file(**_writing(config, out))


def data_perturb(config: Config, run: RunDir | None, *, prompts: Path, out: Path) -> dict[str, Any]:
    """A perturbed prompt, and its edits, for each line of ``prompts``, as JSON lines in ``out``."""
    from spatialt2i.data.files import write_pair_file
    return write_pair_file(prompts=prompts, **_writing(config, out))


def reward_train(config: Config, run: RunDir) -> dict[str, Any]:
    """Part 2: SpatialScore, under ``reward/``."""
    _needs(run, "data", "data build")
    if config.reward.swap and set(config.data.keep) != set(RULES):
        raise ConfigError(f"reward.swap = {config.reward.swap} with data.keep = {list(config.data.keep)}: a rejected "
                          "image need not be right under its own prompt, so it cannot be shown as chosen; set "
                          "reward.swap=0")
    from spatialt2i.reward.model import SpatialScoreModel
    from spatialt2i.reward.train import train

    def work() -> dict[str, Any]:
        model = SpatialScoreModel.from_backbone(
            parts.model_folder(config.reward.backbone), config=config.reward,
            seed=seed_of(config.seed, "reward", "weights"), device=parts.device_of(config))
        return train(model=model, train_pairs=list(read_preferences(shards(run, "train"))),
                     validation_pairs=list(read_preferences(shards(run, "validation"))), config=config.reward,
                     seed=config.seed, run=run, data=run.digest("data"))

    return _stage(run, "reward", _key(config, "reward"), work, inputs=("data",), outputs=("reward/model",))


def reward_eval(config: Config, run: RunDir) -> dict[str, Any]:
    """Pairwise accuracy of SpatialScore on the test split, under ``reward_eval/``."""
    _needs(run, "reward", "reward train")
    from spatialt2i.reward.evaluate import pairwise_accuracy

    def work() -> dict[str, Any]:
        scorer, total = parts.make_scorer(config, run), run.manifest("data")["counts"]["test"]
        pairs = progress(read_preferences(shards(run, "test")), desc="reward eval", total=total)
        return pairwise_accuracy(scorer=scorer, pairs=pairs)

    return _stage(run, "reward_eval", "", work, inputs=("data", "reward"))


def reward_score(config: Config, run: RunDir | None, *, images: Sequence[Path], prompts: Sequence[str],
                 model: str | None, backbone: str | None) -> dict[str, Any]:
    """Scores of image files: mean and std of each, under one prompt or each under its own.

    Raises:
        ValueError: no model is named, prompts and images do not pair up, a prompt is empty.
        OSError: an image is missing or corrupt.
    """
    if len(prompts) not in (1, len(images)):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: expected one prompt, or one per image")
    if not all(text.strip() for text in prompts):
        raise ValueError("an empty prompt: expected a text that says where things are")
    if run is None and model is None:
        raise ValueError("which SpatialScore? Give --run with a trained one, or --model with a folder or hub id")
    if model is None:
        _needs(run, "reward", "reward train")
    texts = list(prompts) * len(images) if len(prompts) == 1 else list(prompts)
    pictures = [read_image(path) for path in images]
    scores = parts.make_scorer(config, run, model, backbone).score(images=pictures, prompts=texts)
    return {"scores": [
        {"image": str(path), "prompt": text, "mean": float(scores.mean[i]),
         "std": None if scores.std is None else float(scores.std[i])}
        for i, (path, text) in enumerate(zip(images, texts, strict=True))]}


def rl_train(config: Config, run: RunDir) -> dict[str, Any]:
    """Part 3: the adapter, under ``rl/``."""
    _needs(run, "reward", "reward train")
    from spatialt2i.rl.train import train

    def work() -> dict[str, Any]:
        sets = parts.bench_prompts(config)
        stream = parts.training_prompts(config, avoid={p.text for prompts in sets.values() for p in prompts})
        policy = parts.make_policy(config)
        for prompts in (*sets.values(), *map(stream, range(config.rl.steps))):
            for prompt in prompts:
                policy.check(prompt)  # now, and not after hours of training
        return train(policy=policy, scorer=parts.make_scorer(config, run), prompts=stream, config=config.rl,
                     seed=config.seed, run=run, gallery=sets["in_domain"][: config.rl.gallery_prompts],
                     inputs=f"{parts.made(config.rl.model)} {run.digest('reward')}")

    return _stage(run, "rl", _key(config, "rl"), work, inputs=("reward",), outputs=("rl/adapter",))


def rl_sample(config: Config, run: RunDir | None, *, prompts: Sequence[str], first_seed: int, count: int, base: bool,
              out: Path | None) -> dict[str, Any]:
    """Pictures of some prompts, written as 000.png, 001.png ...; ``base`` leaves the adapter out."""
    if run is None and not base:
        raise ValueError("which adapter? Give --run with a trained one, or --base to draw without any")
    if out is None and run is None:
        raise ValueError("where to? Give --out a folder, or --run a run")
    if not base:
        _needs(run, "rl", "rl train")
    policy = parts.make_policy(config, adapter=None if base else run.path / "rl" / "adapter")
    wanted = [(Prompt(f"cli-{i}", t, "", ()), first_seed + j) for i, t in enumerate(prompts) for j in range(count)]
    folder = out or run.path / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    with progress(len(wanted), desc="drawing") as bar:
        for at in range(0, len(wanted), config.rl.sample_batch):  # each batch is written before the next is drawn
            part = wanted[at:at + config.rl.sample_batch]
            images = policy.generate(prompts=[p for p, _ in part], seeds=[seed for _, seed in part])
            for image, (prompt, seed) in zip(images, part, strict=True):
                name = folder / f"{len(written):03d}.png"
                with atomic_path(name) as path:
                    image.save(path, "PNG")
                written.append({"image": str(name), "prompt": prompt.text, "seed": seed})
            bar.update(len(part))
    return {"pictures": written}


def bench_indomain(config: Config, run: RunDir) -> dict[str, Any]:
    """Part 4: base against tuned generator, pictures under ``eval/``, figures under ``bench/``."""
    _needs(run, "rl", "rl train")
    from spatialt2i.bench.indomain import compare
    from spatialt2i.rl.policy import DRAWING
    adapter = run.path / "rl" / "adapter"
    base = f"{parts.made(config.rl.model)} {json_text({name: getattr(config.rl, name) for name in DRAWING})}"

    def work() -> dict[str, Any]:
        return compare(
            generators={"base": lambda: parts.make_policy(config),
                        "tuned": lambda: parts.make_policy(config, adapter=adapter)},
            identities={"base": base, "tuned": f"{base} {tree_hash(adapter)}"},
            verifier=parts.make_verifier(config, run.stage("eval")), scorer=parts.make_scorer(config, run),
            prompts=parts.bench_prompts(config), config=config.bench, seed=config.seed, folder=run.stage("eval"))

    key = f"{seed_of(_key(config, 'bench'), base):016x}"
    return _stage(run, "bench", key, work, inputs=("reward", "rl"), outputs=("eval",))


def report(config: Config, run: RunDir, *, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """The page and the figures of what is there, ``report.html`` and ``report.json`` in the run's folder.

    With the folders of other runs in ``beside`` also ``compare.html``, and its figures under ``compare``.
    """
    from spatialt2i.report.compare import compare
    from spatialt2i.report.page import write_report
    if not any(run.manifest(path.parent.name) for path in run.path.glob("*/manifest.json")):
        raise RunError(f"{run.path}: no stage is finished, so there is nothing to report; start with "
                       f"`spatialt2i data build --run {run.path}`, or check the name")
    figures = write_report(run=run)
    if beside:
        others = [RunDir.open(path, load_config(path / "config.toml")) for path in beside]
        figures["compare"] = compare([run, *others], run.path / "compare.html")
    return figures


def report_card(run: RunDir) -> str:
    """The figures of the run's report on a few lines, the last of which names the page."""
    from spatialt2i.report.figures import report_card
    return report_card(read_json(run.path / "report.json"), str(run.path))


def all_stages(config: Config, run: RunDir) -> dict[str, Any]:
    """From prompts to report; returns the report's figures."""
    for stage in (data_build, reward_train, reward_eval, rl_train, bench_indomain):
        stage(config, run)
    return report(config, run)


def doctor(config: Config, run: RunDir | None) -> dict[str, Any]:
    """The machine, the packages, the shipped weights, and how far the run is."""
    found = {"spatialt2i": __version__, **describe_machine()}
    absent = "missing: needed by the presets tiny and quickstart; make tiny-weights"
    found["weights"] = {}
    for name in parts.SHIPPED:
        size = sum(f.stat().st_size for f in (parts.WEIGHTS / name).rglob("*") if f.is_file())
        found["weights"][name] = f"{size / 2**20:.1f} MB" if size else absent
    found["disk_free_gb"] = round(shutil.disk_usage(run.path if run else Path.cwd()).free / 2**30, 1)
    if "torch" not in found["missing"]:
        found["device"] = str(pick_device(config.device))
    if run is not None:
        found["stages"] = {m["stage"]: f"finished in {m['seconds']:.0f} s, peak {m['peak_mb']:.0f} MB" for m in (
            run.manifest(path.parent.name) for path in sorted(run.path.glob("*/manifest.json")))}
    return found


# ---- helpers ---------------------------------------------------------------------------------------------------------

def shards(run: RunDir, split: str) -> list[Path]:
    """The parquet files of a split, in order.

    Raises:
        RunError: there are none.
    """
    found = sorted((run.path / "data" / "data").glob(f"{split}-*.parquet"))
    if not found and run.manifest("data") and not run.manifest("data")["counts"].get(split):
        raise RunError(f"{run.path / 'data'}: the split {split!r} is empty; ask for more pairs (data.pairs) or a "
                       "larger share of them (data.validation, data.test)")
    if not found:
        raise RunError(f"{run.path / 'data'}: no shards of the split {split!r}; run "
                       f"`spatialt2i data build --run {run.path}`")
    return found


def _stage(run: RunDir, name: str, key: str, work: Callable[[], dict[str, Any]], *, inputs: Sequence[str] = (),
           outputs: Sequence[str] = ()) -> dict[str, Any]:
    """Do the work unless the run has it already, whole, and write the manifest with its figures and costs."""
    if run.done(name, key):
        return run.manifest(name)["figures"]
    ledger = run.stage(name) / "cost.json"
    (run.path / name / "manifest.json").unlink(missing_ok=True)  # what it names is about to be replaced
    with measured(ledger) as cost:
        figures = work()
    run.finish(name, key=key, counts=figures.get("counts", {}), seconds=cost.seconds, peak_mb=cost.peak_mb,
               inputs=inputs, outputs=outputs, extra={"figures": figures})
    ledger.unlink()
    return figures


def _key(config: Config, name: str) -> str:
    """Hash of what a stage is told: the seed, its section, and the shipped model that it uses."""
    models = {"reward": config.reward.backbone, "rl": config.rl.model}
    made = [parts.made(models[name])] if name in models else []
    return f"{seed_of(config.seed, json_text(lasting(name, getattr(config, name))), *made):016x}"


def _needs(run: RunDir, stage: str, command: str) -> None:
    if run.manifest(stage) is None:
        raise RunError(f"{run.path}: the stage {stage!r} is not finished; run "
                       f"`spatialt2i {command} --run {run.path}` first")


def _writing(config: Config, out: Path) -> dict[str, Any]:
    """What the writers of files are told; a model's replies are kept beside the file."""
    writer = parts.make_writer(config, out.with_suffix(".replies.sqlite"))
    return {"writer": writer, "config": config.data, "seed": config.seed, "path": out}
