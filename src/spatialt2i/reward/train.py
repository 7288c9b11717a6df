"""Trains SpatialScore on preference pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatialt2i.core.config import RewardConfig
from spatialt2i.core.run import RunDir, interrupts_held, progress, seed_of
from spatialt2i.core.types import Preference
from spatialt2i.reward import checkpoint
from spatialt2i.reward.distort import distort
from spatialt2i.reward.evaluate import pairwise_accuracy
from spatialt2i.reward.losses import Metrics, bradley_terry, gaussian_bradley_terry, sampled_bradley_terry
from spatialt2i.reward.model import Inputs, SpatialScoreModel
from spatialt2i.reward.pixels import decode
from spatialt2i.reward.rename import rename
from spatialt2i.reward.scorer import SpatialScore, load_trained

STAGE = "reward"
DRAWS = 1000  # of the sampled loss [HPSv3]
STATS_PAIRS = 512  # training pairs whose 1024 scores give the stored mean and standard deviation


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite; the state before that update is saved."""


def train(*, model: SpatialScoreModel, train_pairs: Sequence[Preference], validation_pairs: Sequence[Preference],
          config: RewardConfig, seed: int, run: RunDir, data: str) -> dict[str, Any]:
    """Train a model, or continue where an earlier call on this run stopped, and save it under ``reward/model``.

    Which pairs an update sees, and what dropout drops, is named by (seed, epoch) and (seed, step), so neither depends
    on the micro-batch; on the CPU a run that was interrupted and continued ends with the same bits as one that was not.

    Args:
        model: fresh from `SpatialScoreModel.from_backbone`, with this config.
        train_pairs: what to learn from. validation_pairs: what ``model`` is chosen by, at least one.
        config: the ``[reward]`` section.
        seed: of the run.
        run: where metrics, checkpoints and the result go.
        data: names the pairs, for example by their hash; a checkpoint of other ones is refused.

    Returns:
        ``accuracy`` (of the saved model on the validation pairs, see `pairwise_accuracy`), ``step`` (when it was
        saved), ``steps``, ``mean`` and ``std`` of its scores on training images, and ``pairs``.

    Raises:
        ValueError: there are no pairs, a prompt or an image is unusable, or no validation pair could be judged.
        CheckpointMismatch: the run holds a checkpoint of another config, seed or data.
        TrainingDiverged: the loss or its gradient became NaN or infinite.
    """
    if not train_pairs or not validation_pairs:
        raise ValueError(f"{len(train_pairs)} training and {len(validation_pairs)} validation pairs: both are needed; "
                         "build more pairs (data.pairs, data.validation)")
    folder, device = run.stage(STAGE), model.device
    texts = _texts(model, train_pairs)
    names = sorted({name for pair in train_pairs for name in pair.pair.perfect.objects})
    optimizer = make_optimizer(model, config)
    identity = checkpoint.identity(config, seed, data, model.fingerprint)
    start, best = checkpoint.resume(folder, model=model, optimizer=optimizer, identity=identity)
    run.truncate_metrics(STAGE, start)
    held_out = validation_pairs[:config.eval_pairs]
    saved, done = start, start
    bar = progress(config.steps, desc="reward train", initial=start)
    try:
        for step in range(start, config.steps):
            set_rates(optimizer, step, config)
            batch = batch_of(step, len(train_pairs), config=config, seed=seed)
            keep = dropout_mask(step, config=config, seed=seed).to(device)              # [2, batch, head_width]
            total: dict[str, float] = {}
            for at in range(0, config.batch, config.micro_batch):
                part = slice(at, at + config.micro_batch)
                inputs = _inputs(model, train_pairs, texts, names, batch[part])         # 2b images, chosen ones first
                mu, log_sigma = model(inputs.to(device), keep[:, part].flatten(0, 1))   # [2b], [2b]
                loss, metrics = pair_loss(mu, log_sigma, step=step, config=config, seed=seed)
                share = len(batch[part]) / config.batch
                (loss * share).backward()
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    total[name] = total.get(name, 0.0) + share * value.item()
            norm = torch.nn.utils.clip_grad_norm_(model.trainable().values(), config.max_grad_norm).item()
            if not (math.isfinite(total["loss"]) and math.isfinite(norm)):
                raise TrainingDiverged(f"update {step}: the loss is {total['loss']} and the gradient norm {norm}; the "
                                       f"weights before this update are in {folder}. Lower reward.lr, lr_head or "
                                       "lr_token, and start the stage afresh with --if-exists delete")
            with interrupts_held():  # weights, evaluation, metrics and step counter belong together
                optimizer.step()
                optimizer.zero_grad()
                row, done = {**total, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}, step + 1
                if done % config.eval_every == 0 or done == config.steps:
                    found, best = _evaluate(model, held_out, done, best, folder)
                    row |= found
                run.log(STAGE, step, row)
            if done % config.save_every == 0 or done == config.steps:
                checkpoint.save(folder, done, model=model, optimizer=optimizer, identity=identity, best=best)
                saved = done
            bar.set_postfix(loss=f"{total['loss']:.3f}", accuracy=f"{total['accuracy']:.2f}", refresh=False)
            bar.update()
    finally:
        bar.close()
        if done > saved:
            checkpoint.save(folder, done, model=model, optimizer=optimizer, identity=identity, best=best)
    if not best:  # the last evaluation, which also saves the best weights, did not come to its end
        _, best = _evaluate(model, held_out, done, best, folder)
    return _finish(model, train_pairs, validation_pairs, best, folder, config)


def pair_loss(mu: Tensor, log_sigma: Tensor, *, step: int, config: RewardConfig, seed: int) -> tuple[Tensor, Metrics]:
    """The configured Bradley-Terry loss of scores [2b], those of the chosen images first."""
    (mu_w, mu_l), (s_w, s_l) = mu.chunk(2), log_sigma.exp().chunk(2)
    if config.loss == "plain":
        return bradley_terry(mu_w=mu_w, mu_l=mu_l)
    if config.loss == "gaussian":
        return gaussian_bradley_terry(mu_w=mu_w, s_w=s_w, mu_l=mu_l, s_l=s_l, nodes=config.quadrature_nodes)
    generator = torch.Generator().manual_seed(seed_of(seed, STAGE, "draws", step))
    return sampled_bradley_terry(mu_w=mu_w, s_w=s_w, mu_l=mu_l, s_l=s_l, draws=DRAWS, generator=generator)


def make_optimizer(model: SpatialScoreModel, config: RewardConfig) -> torch.optim.AdamW:
    """AdamW with a rate each for the body, the head and the token."""
    rates = {"body": config.lr, "head": config.lr_head, "token": config.lr_token}
    groups: dict[str, list[Tensor]] = {name: [] for name in rates}
    for name, parameter in model.trainable().items():
        groups["head" if name.startswith("head.") else "token" if name == "token" else "body"].append(parameter)
    return torch.optim.AdamW([{"params": groups[name], "lr": rate, "base_lr": rate} for name, rate in rates.items()
                              if groups[name]], weight_decay=config.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: RewardConfig) -> None:
    """Linear warm-up, then constant or a half cosine down to zero."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        factor = (step + 1) / warmup
    elif config.decay == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))
    else:
        factor = 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def batch_of(step: int, n: int, *, config: RewardConfig, seed: int) -> np.ndarray:
    """Which pairs an update sees: the next ones of an endless row of reshuffled epochs.

    Returns:
        A record array [batch]: ``row``, position among the n pairs; ``swap``, whether it is seen from the perturbed
        prompt; ``reject``, what stands in for the rejected side: "", "distorted" or "renamed"; ``seed`` of that.
    """
    batch = np.empty(config.batch, dtype=[("row", int), ("swap", bool), ("reject", "U9"), ("seed", int)])
    at = np.arange(step * config.batch, (step + 1) * config.batch)
    for epoch in np.unique(at // n).tolist():
        rng = np.random.default_rng(seed_of(seed, STAGE, "order", epoch))
        here = at // n == epoch
        now = at[here] % n
        batch["row"][here], batch["swap"][here] = rng.permutation(n)[now], (rng.random(n) < config.swap)[now]
        share, batch["seed"][here] = rng.random(n)[now], rng.integers(2**62, size=n)[now]
        batch["reject"][here] = np.select([share < config.distorted, share < config.distorted + config.renamed],
                                          ["distorted", "renamed"], "")
    return batch


def dropout_mask(step: int, *, config: RewardConfig, seed: int) -> Tensor:
    """What the head's dropout keeps in an update: bool [2, batch, head_width], chosen images first."""
    generator = torch.Generator().manual_seed(seed_of(seed, STAGE, "dropout", step))
    return torch.rand(2, config.batch, config.head_width, generator=generator) >= config.head_dropout


def _texts(model: SpatialScoreModel, pairs: Sequence[Preference]) -> list[list[list[int]]]:
    """Token ids of the perfect and of the perturbed prompt of each pair, [pairs][2][tokens]."""
    prompts = [(pair, p) for pair in pairs for p in (pair.pair.perfect, pair.pair.perturbed)]
    ids = model.tokenize([p.text for _, p in prompts], [f"pair {pair.prompt.id}, prompt {p.id}" for pair, p in prompts])
    return [ids[i:i + 2] for i in range(0, len(ids), 2)]


def _inputs(model: SpatialScoreModel, pairs: Sequence[Preference], texts: Sequence[list[list[int]]],
            names: Sequence[str], batch: np.ndarray) -> Inputs:
    """The images of some pairs, chosen ones first, each under the prompt that it is judged under."""
    chosen: list[tuple[np.ndarray, list[int]]] = []
    rejected: list[tuple[np.ndarray, list[int]]] = []
    for i, swap, reject, seed in batch.tolist():
        pair, rng = pairs[i], np.random.default_rng(seed)
        name = f"pair {pair.prompt.id}"
        sides = (pair.chosen, f"{name}, chosen"), (pair.rejected, f"{name}, rejected")
        swap = swap and bool(pair.pair.edits)  # each image satisfies its own prompt, if there is another one
        image, text = decode(*sides[swap]), texts[i][swap]
        chosen.append((image, text))
        if reject == "distorted":
            rejected.append((distort(image, rng), text))
        elif reject == "renamed" and (other := rename((pair.pair.perfect, pair.pair.perturbed)[swap], names, rng)):
            rejected.append((image, *model.tokenize([other], [f"{name}, with an object renamed"])))
        else:
            rejected.append((decode(*sides[1 - swap]), text))
    images, prompts = zip(*chosen, *rejected, strict=True)
    return model.collate(images, prompts)


def _evaluate(model: SpatialScoreModel, pairs: Sequence[Preference], step: int, best: dict[str, Any],
              folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracy on held-out pairs, and the best so far, whose weights are saved."""
    scorer = SpatialScore(model, batch=model.config.score_batch)
    found = pairwise_accuracy(scorer=scorer, pairs=pairs)
    values = {name: found[name]["value"] for name in ("one", "two_three", "overall")}
    if values["overall"] is None:
        raise ValueError(f"step {step}: none of {len(pairs)} validation pairs could be judged, every score is NaN; "
                         "lower reward.lr, lr_head or lr_token, and start the stage afresh with --if-exists delete")
    if not best or values["overall"] >= best["accuracy"]:
        scorer.save_pretrained(folder / "best")
        best = {"accuracy": values["overall"], "step": step}
    return {f"validation/{name}": v for name, v in values.items() if v is not None}, best


def _finish(model: SpatialScoreModel, train_pairs: Sequence[Preference], validation_pairs: Sequence[Preference],
            best: dict[str, Any], folder: Path, config: RewardConfig) -> dict[str, Any]:
    """Load the best weights, measure the statistics of their scores on training images, and save them."""
    load_trained(model, folder / "best" / "trained.safetensors")
    scorer = SpatialScore(model, batch=config.score_batch)
    sample = train_pairs[:STATS_PAIRS]
    scores = scorer.score(images=[p.chosen for p in sample] + [p.rejected for p in sample],
                          prompts=[p.prompt for p in sample] * 2).mean
    scorer.stats = (float(scores.mean()), float(max(scores.std(), 1e-6)))
    scorer.save_pretrained(folder / "model")
    return {"accuracy": pairwise_accuracy(scorer=scorer, pairs=validation_pairs), "step": best["step"],
            "steps": config.steps, "mean": scorer.stats[0], "std": scorer.stats[1], "pairs": len(train_pairs)}
