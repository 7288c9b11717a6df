"""The settings of every stage as frozen dataclasses, and the strict loader of the TOML presets that change them.

Defaults are the paper's values (arXiv 2602.24233). Where it is silent the comment names whose value stands in:
[HPSv3], [VideoAlign] and [Flow-GRPO] are those projects' published settings, [ours] is our choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import tomli_w

PRESETS = Path(__file__).resolve().parent.parent / "presets"
MOST_RELATIONS = 12  # of one prompt: what the writers can write
DTYPES, KERNELS = ("float32", "bfloat16"), ("sde", "cps", "dance", "ode")
# what a pair may have to be: each picture right under its own prompt, and wrong under the other
RULES = ("chosen right", "rejected right", "chosen differs", "rejected differs")
PER_PROMPT = (0, 0, 503, 3348, 10572, 15572, 19054, 13829, 11056, 3430, 1428, 357)  # figure "relations per prompt"


def setting(default: Any, help: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None,
            choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with a meaning and a range (of each item of a tuple), which the loader enforces."""
    meta = {"help": help, "ge": ge, "gt": gt, "le": le, "choices": choices}
    return field(default=default, metadata={k: v for k, v in meta.items() if v is not None})


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint, of chats or of images. Prices and budget are in one currency, whichever."""

    base_url: str = setting("https://api.openai.com/v1", "where it is")  # [ours], like all of these
    model: str = setting("gpt-5", "which model")  # the paper's writer
    key_env: str = setting("OPENAI_API_KEY", "environment variable of the key; empty where no key is needed")
    temperature: float = setting(1.0, "randomness of its replies", ge=0, le=2)
    max_tokens: int = setting(2000, "longest reply", ge=16)
    concurrency: int = setting(16, "requests at a time", ge=1)
    timeout: float = setting(120.0, "seconds until a request is tried again", gt=0)
    retries: int = setting(8, "further tries after limits, time-outs and errors of the server", ge=0)
    price_in: float = setting(0.0, "price of a million tokens read", ge=0)
    price_out: float = setting(0.0, "price of a million tokens written", ge=0)
    price_image: float = setting(0.0, "price of a picture", ge=0)
    budget: float = setting(0.0, "stop before this is spent; 0 sets no limit", ge=0)


@dataclass(frozen=True)
class DataConfig:
    """Part 1: prompts, perturbations, images, verdicts, pairs."""

    writer: str = setting("tiny-grammar", "who writes and perturbs prompts", choices=("tiny-grammar", "grammar", "llm"))
    generators: tuple[str, ...] = setting(("tiny-painter",), "tiny-painter, or names or files as in presets/images")
    generator_shares: tuple[float, ...] = setting((1.0,), "how much of the pairs each of them draws, relatively", ge=0)
    same_generator: bool = setting(True, "one generator draws both images of a pair; else the next one the rejected")
    same_seed: bool = setting(True, "both images of a pair start from the same seed")
    image_format: str = setting("webp", "png and webp lose nothing", choices=("png", "webp", "jpeg"))
    verifier: str = setting("tiny-oracle", "who judges: tiny-oracle, or a name or file as in presets/judges")
    pairs: int = setting(80_000, "candidate pairs to write; verification keeps most of them", ge=1)
    relations: tuple[float, ...] = setting(PER_PROMPT, "relative frequency of prompts with 1, 2, 3 ... relations", ge=0)
    keep: tuple[str, ...] = setting(RULES, "what a pair must be, by the verifier, to be kept", choices=RULES)
    one_perturbation: float = setting(0.49, "share of pairs with one edit; the others have two or three", ge=0, le=1)
    wrong_layout: float = setting(0.1, "share of images painted with a wrong layout (tiny painter only)", ge=0, le=1)
    validation: float = setting(0.02, "share of pairs in the validation split", ge=0, le=0.5)  # [ours]
    test: float = setting(0.02, "share of pairs in the test split", ge=0, le=0.5)  # [ours]
    shard: int = setting(1000, "pairs per unit of work; what a killed process may lose", ge=1)
    engine: str = setting("local", "processes here, or Ray on a cluster", choices=("local", "ray"))
    workers: int = setting(0, "processes; 0: one per core (GPU, with ray), or one where a model draws or judges", ge=0)
    llm: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass(frozen=True)
class RewardConfig:
    """Part 2: SpatialScore."""

    backbone: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", "hub id or folder of a Qwen2.5-VL model")
    instruction: str = setting("Judge only whether the objects are placed as the text says.", "put before the prompt")
    dtype: str = setting("bfloat16", "dtype of the backbone; the head is always float32", choices=DTYPES)  # [HPSv3]
    lora_rank: int = setting(64, "rank of the language model's adapters; 0 trains none", ge=0)  # [VideoAlign]
    lora_alpha: int = setting(128, "scale of the adapters is alpha / rank", ge=1)  # [VideoAlign]
    train_merger: bool = setting(True, "train the vision-to-language merger")  # [VideoAlign]
    train_vision: bool = setting(True, "train the vision tower")  # [VideoAlign]
    head_width: int = setting(1024, "width of the head's first layer", ge=1)  # [HPSv3]
    head_hidden: int = setting(16, "width of the head's second layer", ge=1)  # [HPSv3]
    head_dropout: float = setting(0.05, "dropout after the head's first layer", ge=0, le=0.9)  # [HPSv3]
    loss: str = setting("gaussian", "Bradley-Terry on mu and sigma, or mu", choices=("gaussian", "sampled", "plain"))
    quadrature_nodes: int = setting(32, "Gauss-Hermite nodes of the gaussian loss", ge=4, le=128)  # [ours]
    max_pixels: int = setting(200_704, "pixels that each image is resized to, its aspect kept", ge=64)  # [HPSv3]
    max_text_tokens: int = setting(512, "longest prompt in tokens; a longer one is an error", ge=8)  # [ours]
    batch: int = setting(32, "pairs per update", ge=1)
    micro_batch: int = setting(4, "pairs per forward", ge=1)
    swap: float = setting(0.0, "share of pairs that an epoch shows from the perturbed prompt", ge=0, le=1)
    distorted: float = setting(0.0, "share of rejected images that are the chosen one, broken", ge=0, le=1)  # [ours]
    renamed: float = setting(0.0, "share of pairs that reject a prompt with an object renamed", ge=0, le=1)  # [ours]
    steps: int = setting(2500, "updates; 80,000 pairs / 32 = 2,500 are one epoch", ge=1)  # [ours]
    lr: float = setting(2e-6, "learning rate of adapters, merger and vision tower", gt=0)
    lr_head: float = setting(2e-6, "learning rate of the head", gt=0)  # [HPSv3]
    lr_token: float = setting(2e-6, "learning rate of the reward token's embedding row", gt=0)  # [HPSv3]
    warmup: float = setting(0.05, "share of the updates over which the rate rises", ge=0, le=1)  # [HPSv3]
    decay: str = setting("constant", "what the rate does after warm-up", choices=("constant", "cosine"))  # [HPSv3]
    weight_decay: float = setting(0.0, "AdamW weight decay", ge=0)  # [HPSv3]
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this", gt=0)  # [HPSv3]
    eval_every: int = setting(250, "updates between two evaluations on the validation split", ge=1)  # [ours]
    eval_pairs: int = setting(512, "pairs of such an evaluation", ge=1)  # [ours]
    save_every: int = setting(100, "updates between two checkpoints", ge=1)  # [ours]
    score_batch: int = setting(64, "images per forward when scoring", ge=1)  # [ours]


@dataclass(frozen=True)
class RLConfig:
    """Part 3: Spatial-RL."""

    model: str = setting("black-forest-labs/FLUX.1-dev", "hub id or folder of a FLUX pipeline")
    dtype: str = setting("bfloat16", "dtype of the model; latents are always float32", choices=DTYPES)  # [Flow-GRPO]
    resolution: int = setting(512, "height and width of the pictures in pixels", ge=16)  # [Flow-GRPO]
    guidance_scale: float = setting(3.5, "distilled guidance", ge=0)  # [Flow-GRPO]
    max_text_tokens: int = setting(256, "T5 tokens per prompt; a longer prompt is an error", ge=8)  # [ours]
    steps: int = setting(300, "RL steps (one update of the weights each)", ge=1)  # [ours]
    prompts_per_step: int = setting(24, "prompts per RL step (P)", ge=1)  # [Flow-GRPO]: 48 per epoch, 2 updates
    group: int = setting(24, "images per prompt (G)", ge=2)
    top_k: int = setting(6, "keep the k best and the k worst of a group; 0 keeps all", ge=0)
    stats_over: str = setting("kept", "rewards' mean and std: over the kept or the group", choices=("kept", "group"))
    global_std: bool = setting(False, "one std for all groups of a step, not each group's own")  # the paper: own
    advantage_clip: float = setting(5.0, "advantages are clamped to +- this", gt=0)  # [Flow-GRPO]
    rollout_steps: int = setting(6, "denoising steps while training (T)", ge=1)
    eval_steps: int = setting(28, "denoising steps, without noise, for evaluation", ge=1)  # [Flow-GRPO]
    kernel: str = setting("sde", "of steps: Flow-SDE, CPS, Dance; of pictures: ode", choices=KERNELS)  # the paper: sde
    noise: float = setting(0.9, "noise level of the kernel", gt=0)  # [Flow-GRPO]
    draws: int = setting(1, "noises per picture and trained step; their log-probs are averaged (kernel ode)", ge=1)
    same_start: bool = setting(False, "the images of a prompt start from the same noise")  # DanceGRPO: True
    train_from: int = setting(0, "first denoising step that is trained on", ge=0)  # [Flow-GRPO]
    train_steps: int = setting(5, "steps trained on; the others draw no noise", ge=1)  # [Flow-GRPO]: not the last
    clip: float = setting(1e-4, "clip range of the ratio", gt=0)
    kl: float = setting(0.01, "weight of the KL to the base model", ge=0)
    lr: float = setting(3e-4, "learning rate of the adapter", gt=0)
    lora_rank: int = setting(32, "rank of the adapter", ge=1)
    lora_alpha: int = setting(64, "scale of the adapter is alpha / rank", ge=1)  # [Flow-GRPO]: twice the rank
    weight_decay: float = setting(1e-4, "AdamW weight decay", ge=0)  # [Flow-GRPO]
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this", gt=0)  # [Flow-GRPO]
    ema: float = setting(0.9, "decay of the averaged adapter; 0 averages nothing", ge=0, le=0.9999)  # [Flow-GRPO]
    ema_every: int = setting(8, "updates between two averagings", ge=1)  # [Flow-GRPO]
    micro_batch: int = setting(4, "denoising steps (of any trajectories) per forward while updating", ge=1)  # [ours]
    sample_batch: int = setting(4, "trajectories per forward while sampling", ge=1)  # [ours]
    save_every: int = setting(10, "RL steps between two checkpoints", ge=1)  # [ours]
    gallery_every: int = setting(10, "RL steps between two galleries of the same prompts and seeds", ge=1)  # [ours]
    gallery_prompts: int = setting(8, "prompts of a gallery", ge=1)  # [ours]
    gate_tolerance: float = setting(1e-4, "largest |log ratio| of the first rollout, replayed", gt=0)  # [ours]
    relations: tuple[float, ...] = setting(PER_PROMPT, "relative frequency of prompts with 1, 2, 3 ... relations", ge=0)


@dataclass(frozen=True)
class BenchConfig:
    """Part 4: the in-domain comparison of the base and the tuned generator."""

    in_domain_prompts: int = setting(200, "held-out prompts with in_domain_relations", ge=2)  # [ours]
    hard_prompts: int = setting(200, "held-out prompts with hard_relations", ge=2)  # [ours]
    in_domain_relations: tuple[int, ...] = setting((3, 4, 5, 6), "of its prompts, in turn", ge=1, le=MOST_RELATIONS)
    hard_relations: tuple[int, ...] = setting((7, 8, 9, 10), "of its prompts, in turn", ge=1, le=MOST_RELATIONS)
    images_per_prompt: int = setting(1, "images per prompt and model, each from a seed of its own", ge=1)  # [ours]
    bootstrap: int = setting(10_000, "resamples of the paired bootstrap", ge=100)  # [ours]


@dataclass(frozen=True)
class Config:
    """Everything a run needs; the resolved copy is stored in the run's folder."""

    seed: int = setting(0, "every random draw is derived from it", ge=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps ...")
    threads: int = setting(0, "CPU threads of one process; 0 means all cores", ge=0)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


class ConfigError(ValueError):
    """A setting that does not exist or must not have this value; the message says where, what and what else."""


class Setting(NamedTuple):
    """One row of ``--help``: ``rl.top_k``, ``int >= 0``, ``6``, and what it means."""

    key: str
    type: str
    value: str
    help: str


def preset_names(folder: Path = PRESETS) -> list[str]:
    """The names of the shipped presets."""
    return sorted(p.stem for p in folder.glob("*.toml"))


def load_config(preset: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The defaults, changed by a preset, changed by overrides.

    Args:
        preset: the name of a shipped preset, or a TOML file (a run's ``config.toml`` is one).
        overrides: ``rl.top_k=6``; the value is TOML, and a bare word is a string.

    Raises:
        ConfigError: unknown preset, unknown key, wrong type, value out of range, settings that exclude each other.
    """
    path = preset_path(preset)
    config = read_settings(Config, path, overrides)
    _check_together(config, f"{path}" + (f" with {' '.join(overrides)}" if overrides else ""))
    return config


def read_settings(cls: type[Any], path: Path, overrides: Sequence[str] = ()) -> Any:
    """The defaults of such a dataclass, changed by a TOML file, changed by overrides; see `load_config`.

    Raises:
        ConfigError: no TOML file, unknown key, wrong type, value out of range.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"{path}: not a TOML file that can be read: {e}") from e
    values = {key: _checked(key, value, str(path), _fields(cls)) for key, value in _flat(table, _fields(cls))
              if value != {} or not hasattr(cls(), key)}  # an empty section is fine where the section exists
    for override in overrides:
        key, sign, text = (part.strip() for part in override.partition("="))
        if not sign or not key:
            raise ConfigError(f"override {override!r}: expected KEY=VALUE, for example rl.top_k=6")
        values[key] = _checked(key, _override_value(text), f"override {override!r}", _fields(cls))
    return _build(cls, "", values)


def to_dict(section: Any) -> dict[str, Any]:
    """A config, or one section of it, as nested dicts of JSON-able values; floats are floats even where written 1."""
    out: dict[str, Any] = {}
    for name, kind in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(kind):
            out[name] = to_dict(value)
        elif get_origin(kind) is tuple:
            out[name] = [get_args(kind)[0](v) for v in value]
        else:
            out[name] = kind(value)
    return out


def to_toml(config: Any) -> str:
    """TOML text that `load_config` reads back to an equal config."""
    return tomli_w.dumps(to_dict(config))


def describe(config: Config, sections: Sequence[str] | None = None) -> list[Setting]:
    """Every setting with its type, its value in ``config`` and its meaning, for ``--help`` and documentation.

    With ``sections``, only those of these sections and those that belong to none.
    """
    values = dict(_flat(to_dict(config), _fields(Config)))
    return [Setting(key, _expected(kind, field_), _shown(values[key]), field_.metadata.get("help", ""))
            for key, (kind, field_) in _fields(Config).items()
            if sections is None or "." not in key or key.split(".")[0] in sections]


def preset_path(preset: str | Path, folder: Path = PRESETS) -> Path:
    """The file of a shipped preset, or the file that was named."""
    names = preset_names(folder)
    if preset in names:
        return folder / f"{preset}.toml"
    path = Path(preset)
    if path.is_file():
        return path
    raise ConfigError(f"preset {str(preset)!r}: no such preset or file; expected a TOML file or one of "
                      + ", ".join(names) + _nearest(str(preset), names))


@cache
def _fields(cls: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    """Dotted key -> (type, field) of every setting of such a dataclass."""
    def walk(cls: type, prefix: str) -> Iterator[tuple[str, tuple[Any, dataclasses.Field]]]:
        hints = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[f.name]):
                yield from walk(hints[f.name], f"{prefix}{f.name}.")
            else:
                yield prefix + f.name, (hints[f.name], f)

    return dict(walk(cls, ""))


def _flat(table: Mapping[str, Any], fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value and fields.get(prefix + name, (None,))[0] is not dict:
            yield from _flat(value, fields, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _build(cls: type, prefix: str, values: Mapping[str, Any]) -> Any:
    chosen = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            chosen[name] = _build(kind, f"{prefix}{name}.", values)
        elif prefix + name in values:
            chosen[name] = values[prefix + name]
    return cls(**chosen)


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _checked(key: str, value: Any, where: str, fields: Mapping[str, Any]) -> Any:
    """The value in the type of its field, or an error that names everything needed to mend it."""
    if key not in fields:
        inside = [k for k in fields if k.startswith(key + ".")]
        if inside:
            raise ConfigError(f"{where}: {key} = {_shown(value)}: {key} is a section; expected a setting in it, "
                              f"such as {inside[0]}")
        raise ConfigError(f"{where}: {key} = {_shown(value)}: there is no setting {key}; expected one that --help lists"
                          + _nearest(key, fields))
    kind, field_ = fields[key]
    error = ConfigError(f"{where}: {key} = {_shown(value)}: expected {_expected(kind, field_)}"
                        + (_nearest(value, field_.metadata["choices"]) if "choices" in field_.metadata else ""))
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise error
        return tuple(_scalar(v, get_args(kind)[0], field_, error) for v in value)
    return _scalar(value, kind, field_, error)


def _scalar(value: Any, kind: type, field_: dataclasses.Field, error: ConfigError) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    rule = field_.metadata
    if (type(value) is not kind or kind is float and not math.isfinite(value)  # not isinstance: True is no int here
            or "choices" in rule and value not in rule["choices"] or "ge" in rule and value < rule["ge"]
            or "gt" in rule and value <= rule["gt"] or "le" in rule and value > rule["le"]):
        raise error
    return value


def _check_together(config: Config, where: str) -> None:
    """Ranges that span two settings."""
    rl, data, reward = config.rl, config.data, config.reward
    trained = f"rl.train_from = {rl.train_from} with rl.train_steps = {rl.train_steps}"
    rules = [
        (2 * rl.top_k <= rl.group, f"rl.top_k = {rl.top_k}: expected at most half of rl.group = {rl.group}, because "
         "the k best and the k worst must be different images"),
        (rl.train_from + rl.train_steps <= rl.rollout_steps, f"{trained}: expected their sum to be at most "
         f"rl.rollout_steps = {rl.rollout_steps}"),
        (rl.kernel != "cps" or rl.train_from + rl.train_steps < rl.rollout_steps, f"{trained} and rl.kernel = \"cps\" "
         f"(no noise at the last step): expected their sum to be below rl.rollout_steps = {rl.rollout_steps}"),
        (rl.kernel != "cps" or rl.noise <= 1, f"rl.noise = {rl.noise} with rl.kernel = \"cps\": expected at most 1"),
        (rl.draws == 1 or rl.kernel == "ode", f"rl.draws = {rl.draws}: expected 1, or rl.kernel = \"ode\""),
        (rl.kernel != "ode" or not rl.same_start, "rl.same_start = true with rl.kernel = ode: images would be equal"),
        (reward.distorted + reward.renamed <= 1,
         f"reward.distorted = {reward.distorted} with reward.renamed = {reward.renamed}: expected a sum of at most 1"),
        (len(data.generators) == len(data.generator_shares) and sum(data.generator_shares) > 0,
         f"data.generator_shares = {_shown(data.generator_shares)}: expected one for each of data.generators"),
        (data.validation + data.test < 1, f"data.validation = {data.validation} with data.test = {data.test}: expected "
         "their sum to be below 1, or nothing is left to train on")]
    for key, weights in (("data.relations", data.relations), ("rl.relations", rl.relations)):
        rules += [(sum(weights) > 0, f"{key} = {_shown(weights)}: expected at least one number above 0"),
                  (len(weights) <= MOST_RELATIONS, f"{key} = {_shown(weights)}: expected at most {MOST_RELATIONS} "
                   f"numbers, because a prompt has 1 to {MOST_RELATIONS} relations")]
    for holds, problem in rules:
        if not holds:
            raise ConfigError(f"{where}: {problem}")


def _expected(kind: Any, field_: dataclasses.Field) -> str:
    rule = field_.metadata
    if "choices" in rule:
        return "one of " + ", ".join(rule["choices"])
    name = f"list of {get_args(kind)[0].__name__}" if get_origin(kind) is tuple else kind.__name__
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="))
    return " ".join([name, " and ".join(f"{sign} {rule[bound]}" for bound, sign in signs if bound in rule)]).strip()


def _nearest(word: Any, words: Any) -> str:
    """``; did you mean X?`` where one of the words is near, by the whole word or by its last part."""
    if not isinstance(word, str):
        return ""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    if not near:
        ends = {w.rsplit(".", 1)[-1]: w for w in words}
        near = [ends[e] for e in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(ends), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
