import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spatialt2i.core.config import Config
from spatialt2i.core.run import RunDir
from spatialt2i.core.store import read_preferences, write_preferences
from spatialt2i.core.types import Scores
from spatialt2i.reward import train as training
from spatialt2i.reward.checkpoint import CheckpointMismatch
from spatialt2i.reward.distort import distort
from spatialt2i.reward.pixels import decode
from spatialt2i.reward.rename import rename
from spatialt2i.reward.scorer import SpatialScore
from spatialt2i.reward.train import TrainingDiverged, batch_of, dropout_mask, train


def run_at(folder) -> RunDir:
    return RunDir.open(folder, Config())


def fit(folder, model, pairs, **options):
    return train(model=model, train_pairs=pairs[:8], validation_pairs=pairs[8:], config=model.config,
                 seed=options.pop("seed", 0), run=run_at(folder), data=options.pop("data", "d"))


def weights(folder):
    return load_file(Path(folder) / "reward" / "checkpoints" / "step-00000004" / "trained.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, step):
    original = training.set_rates

    def stop(optimizer, at, config):
        if at == step:
            raise Interrupted
        original(optimizer, at, config)

    monkeypatch.setattr(training, "set_rates", stop)


def test_the_whole_and_what_it_leaves(make_model, pairs, tmp_path):
    found = fit(tmp_path / "run", make_model(), pairs)
    assert found["steps"] == 4 and found["pairs"] == 8 and found["accuracy"]["overall"]["n"] == 4
    run = run_at(tmp_path / "run")
    rows = run.metrics("reward")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"loss", "accuracy", "margin", "sigma", "grad_norm", "lr"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation/overall" in row] == [1, 3]
    assert len(list((tmp_path / "run" / "reward" / "checkpoints").iterdir())) == 2
    scorer = SpatialScore.from_pretrained(tmp_path / "run" / "reward" / "model")
    assert scorer.stats == (found["mean"], found["std"])
    sample = scorer.score(images=[p for pair in pairs[:8] for p in (pair.chosen, pair.rejected)],
                          prompts=[pair.prompt for pair in pairs[:8] for _ in range(2)], normalized=True).mean
    assert sample.mean() == pytest.approx(0, abs=1e-4) and sample.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("loss", ["gaussian", "sampled", "plain"])
def test_resumed_equals_uninterrupted(make_model, pairs, tmp_path, monkeypatch, loss):
    options = {"loss": loss, "distorted": 0.5 if loss == "plain" else 0}
    fit(tmp_path / "whole", make_model(**options), pairs)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 3)
        fit(tmp_path / "parts", make_model(**options), pairs)
    fit(tmp_path / "parts", make_model(**options), pairs)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert run_at(tmp_path / "whole").metrics("reward") == run_at(tmp_path / "parts").metrics("reward")


@pytest.mark.parametrize("loss", ["gaussian", "sampled"])
def test_accumulation_is_exact(make_model, pairs, tmp_path, loss):
    for name, micro in (("one", 4), ("four", 1)):
        fit(tmp_path / name, make_model(loss=loss, micro_batch=micro, steps=1), pairs)
    one, four = (load_file(tmp_path / n / "reward" / "model" / "trained.safetensors") for n in ("one", "four"))
    rows = [run_at(tmp_path / n).metrics("reward")[0] for n in ("one", "four")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    for name, value in one.items():  # where a gradient is nearly 0, Adam's first step is only its sign
        assert ((value - four[name]).abs() < 1e-4).float().mean() > 0.97, name


KILLED = """
import sys, dataclasses
sys.path.insert(0, sys.argv[4])
from conftest import SMALL
from spatialt2i.core.config import Config
from spatialt2i.core.run import RunDir
from spatialt2i.core.store import read_preferences
from spatialt2i.reward.model import SpatialScoreModel
from spatialt2i.reward.train import train
pairs = list(read_preferences([sys.argv[2]]))
model = SpatialScoreModel.from_backbone(sys.argv[1], config=dataclasses.replace(SMALL, save_every=1), seed=0)
train(model=model, train_pairs=pairs[:8], validation_pairs=pairs[8:], config=model.config, seed=0,
      run=RunDir.open(sys.argv[3], Config()), data="d")
"""


def test_killed_and_started_again_equals_uninterrupted(make_model, backbone, pairs, tmp_path):
    shard = tmp_path / "pairs.parquet"
    write_preferences(shard, pairs)
    folders = [backbone, shard, tmp_path / "killed", Path(__file__).parent]
    command = [sys.executable, "-c", KILLED, *map(str, folders)]
    checkpoints = tmp_path / "killed" / "reward" / "checkpoints"
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(3000):
            if list(checkpoints.glob("step-*")) or killed.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert list(checkpoints.glob("step-*")), "it ended before it saved anything"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed process: the order of sums depends on it
    try:
        read = list(read_preferences([shard]))
        for name in ("killed", "whole"):
            fit(tmp_path / name, make_model(save_every=1), read)
    finally:
        torch.set_num_threads(threads)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def breaking(monkeypatch, at, what):
    """Makes the loss of update ``at`` misbehave."""
    real = training.pair_loss

    def loss(mu, log_sigma, *, step, config, seed):
        value, metrics = real(mu, log_sigma, step=step, config=config, seed=seed)
        return (what(value) if step == at else value), metrics

    monkeypatch.setattr(training, "pair_loss", loss)


def test_an_update_that_is_not_finite_stops_and_saves(make_model, pairs, tmp_path, monkeypatch):
    breaking(monkeypatch, 2, lambda loss: loss * float("nan"))
    with pytest.raises(TrainingDiverged, match="update 2: the loss is nan and the gradient norm nan"):
        fit(tmp_path / "run", make_model(save_every=100), pairs)
    assert [p.name for p in (tmp_path / "run" / "reward" / "checkpoints").iterdir()] == ["step-00000002"]


def test_ctrl_c_loses_no_finished_update(make_model, pairs, tmp_path, monkeypatch):
    fit(tmp_path / "whole", make_model(), pairs)

    def interrupt(loss):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        breaking(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", make_model(save_every=100), pairs)
    assert (tmp_path / "run" / "reward" / "checkpoints" / "step-00000003").is_dir()
    fit(tmp_path / "run", make_model(save_every=100), pairs)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_failure_of_the_last_evaluation_is_made_up_for(make_model, pairs, tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", make_model(eval_every=4), pairs)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "pairwise_accuracy", lambda **_: (_ for _ in ()).throw(Interrupted))
        fit(tmp_path / "parts", make_model(eval_every=4), pairs)
    assert fit(tmp_path / "parts", make_model(eval_every=4), pairs) == whole


def test_validation_pairs_that_cannot_be_judged_stop_the_training(make_model, pairs, tmp_path, monkeypatch):
    def unjudged(self, *, images, prompts, normalized=False):
        return Scores(mean=np.full(len(images), np.nan))

    monkeypatch.setattr(SpatialScore, "score", unjudged)
    with pytest.raises(ValueError, match="step 2: none of 4 validation pairs could be judged"):
        fit(tmp_path, make_model(), pairs)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(make_model, pairs, tmp_path):
    fit(tmp_path / "run", make_model(save_every=1), pairs)
    newest = tmp_path / "run" / "reward" / "checkpoints" / "step-00000004"
    whole = weights(tmp_path / "run")
    (newest / "optimizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(OSError, match="step-00000004: not a readable checkpoint.*delete that folder"):
        fit(tmp_path / "run", make_model(save_every=1), pairs)
    shutil.rmtree(newest)
    fit(tmp_path / "run", make_model(save_every=1), pairs)
    assert same(whole, weights(tmp_path / "run"))


def test_checkpoint_of_another_training(make_model, pairs, tmp_path):
    fit(tmp_path / "run", make_model(), pairs)
    with pytest.raises(CheckpointMismatch, match="lr_head was 0.01 and is 0.02"):
        fit(tmp_path / "run", make_model(lr_head=0.02), pairs)
    with pytest.raises(CheckpointMismatch, match="seed was 0 and is 1"):
        fit(tmp_path / "run", make_model(), pairs, seed=1)
    with pytest.raises(CheckpointMismatch, match="data was"):
        fit(tmp_path / "run", make_model(), pairs, data="e")
    fit(tmp_path / "run", make_model(micro_batch=1, score_batch=1), pairs)  # they change memory, not the training


def test_unusable_pairs_are_named(make_model, pairs, tmp_path):
    with pytest.raises(ValueError, match="0 training and 4 validation pairs"):
        train(model=make_model(), train_pairs=[], validation_pairs=pairs[8:], config=make_model().config, seed=0,
              run=run_at(tmp_path / "a"), data="d")
    broken = [dataclasses.replace(p, chosen=p.chosen[:60]) for p in pairs]
    with pytest.raises(ValueError, match=r"pair p\d, chosen: not a readable image"):
        fit(tmp_path / "b", make_model(), broken)


def test_batches_are_shuffled_epochs_whatever_the_batch(make_model):
    config = make_model().config
    stream = np.concatenate([batch_of(step, 6, config=config, seed=3) for step in range(6)])
    assert all(sorted(stream["row"][i:i + 6]) == list(range(6)) for i in range(0, 24, 6))
    other = dataclasses.replace(config, batch=8)
    larger = np.concatenate([batch_of(step, 6, config=other, seed=3) for step in range(2)])
    np.testing.assert_array_equal(stream[:16], larger)
    assert not stream["swap"].any() and (stream["reject"] == "").all()
    assert batch_of(0, 6, config=dataclasses.replace(config, swap=1.0), seed=3)["swap"].all()
    some = batch_of(0, 6, config=dataclasses.replace(config, distorted=0.5, renamed=0.25, batch=400), seed=3)
    np.testing.assert_array_equal(some["row"][:24], stream["row"])
    assert 120 < (some["reject"] == "distorted").sum() < 280 and 50 < (some["reject"] == "renamed").sum() < 150
    assert len(set(some["seed"])) == 400


def inputs(model, pairs, *batch):
    """What `_inputs` makes of rows (row, swap, reject, seed)."""
    names = ["red circle", "blue square"]
    kind = batch_of(0, 1, config=model.config, seed=0).dtype
    return training._inputs(model, pairs, training._texts(model, pairs), names, np.array(list(batch), dtype=kind))


def test_swapped_pairs_are_seen_from_the_perturbed_prompt(make_model, pairs):
    model = make_model()
    ours = inputs(model, pairs, (2, True, "", 0), (5, False, "", 0))
    expected = inputs(model, [pairs[2].swap(), pairs[5]], (0, False, "", 0), (1, False, "", 0))
    assert torch.equal(ours.input_ids, expected.input_ids) and torch.equal(ours.patches, expected.patches)


@pytest.mark.parametrize("swap", [False, True])
def test_a_distorted_pair_is_the_chosen_image_and_a_broken_copy_of_it(make_model, pairs, swap):
    model = make_model()
    found = inputs(model, pairs, (3, swap, "distorted", 77))
    chosen = decode(pairs[3].rejected if swap else pairs[3].chosen, "image")
    broken = distort(chosen, np.random.default_rng(77))
    assert (broken != chosen).any()
    expected = model.collate([chosen, broken], [training._texts(model, pairs)[3][swap]] * 2)
    assert torch.equal(found.patches, expected.patches) and torch.equal(found.input_ids, expected.input_ids)


@pytest.mark.parametrize("swap", [False, True])
def test_a_renamed_pair_is_the_chosen_image_under_its_prompt_and_under_another(make_model, pairs, swap):
    model = make_model()
    prompt, image = ((pairs[3].pair.perfect, pairs[3].chosen), (pairs[3].pair.perturbed, pairs[3].rejected))[swap]
    names = [name for name in ("red circle", "blue square") if name not in prompt.objects]
    found = inputs(model, pairs, (3, swap, "renamed", 77))
    other = rename(prompt, names, np.random.default_rng(77))
    assert other != prompt.text and any(name in other for name in names)
    expected = model.collate([decode(image, "image")] * 2, model.tokenize([prompt.text, other]))
    assert torch.equal(found.patches, expected.patches) and torch.equal(found.input_ids, expected.input_ids)


def test_where_no_object_can_be_renamed_the_other_image_is_rejected(make_model, pairs):
    model = make_model()
    known = sorted(pairs[3].prompt.objects)
    kind = batch_of(0, 1, config=model.config, seed=0).dtype
    found, expected = (training._inputs(model, pairs, training._texts(model, pairs), known,
                                        np.array([(3, False, reject, 77)], dtype=kind)) for reject in ("renamed", ""))
    assert torch.equal(found.patches, expected.patches) and torch.equal(found.input_ids, expected.input_ids)


def test_dropout_is_named_by_the_step(make_model):
    config = make_model().config
    a, b = (dropout_mask(step, config=config, seed=0) for step in (0, 1))
    assert torch.equal(a, dropout_mask(0, config=config, seed=0)) and not torch.equal(a, b)
    assert 0.5 < a.float().mean() < 0.9


def test_it_learns_what_it_is_shown(make_model, pairs, tmp_path):
    fit(tmp_path / "run", make_model(steps=40, eval_every=40, save_every=40, swap=0.5, head_dropout=0.0), pairs)
    rows = run_at(tmp_path / "run").metrics("reward")
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:4], rows[-4:]))
    assert last < 0.9 * first
