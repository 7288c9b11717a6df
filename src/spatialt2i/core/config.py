"""The settings of every stage as frozen dataclasses, and the strict loader of the TOML presets that change them.

Defaults are the paper's values (arXiv 2602.24233). Where it is silent the comment names whose value stands in:
[HPSv3], [VideoAlign] and [Flow-GRPO] are those projects' published settings, [ours] is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, help: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None,
            choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with a meaning and a range, both shown by ``--help`` and enforced by the loader."""
    meta = {"help": help, "ge": ge, "gt": gt, "le": le, "choices": choices}
    return field(default=default, metadata={k: v for k, v in meta.items() if v is not None})


@dataclass(frozen=True)
class DataConfig:
    """Part 1: prompts, perturbations, images, verdicts, pairs."""

    writer: str = setting("tiny-grammar", "who writes and perturbs prompts", choices=("tiny-grammar",))
    generator: str = setting("tiny-painter", "who draws both images", choices=("tiny-painter",))
    verifier: str = setting("tiny-oracle", "who judges each image under its own prompt", choices=("tiny-oracle",))
    pairs: int = setting(80_000, "candidate pairs to write; verification keeps most of them", ge=1)
    relations: tuple[float, ...] = setting(  # figure "relations per prompt"
        (0, 0, 503, 3348, 10572, 15572, 19054, 13829, 11056, 3430, 1428, 357),
        "relative frequency of prompts with 1, 2, 3 ... relations")
    one_perturbation: float = setting(0.49, "share of pairs with one edit; the others have two or three", ge=0, le=1)
    wrong_layout: float = setting(0.1, "share of images painted with a wrong layout (tiny painter only)", ge=0, le=1)
    validation: float = setting(0.02, "share of pairs in the validation split", ge=0, le=0.5)  # [ours]
    test: float = setting(0.02, "share of pairs in the test split", ge=0, le=0.5)  # [ours]
    shard: int = setting(1000, "pairs per unit of work; what a killed process may lose", ge=1)
    workers: int = setting(0, "processes; 0 means one per core", ge=0)


@dataclass(frozen=True)
class RewardConfig:
    """Part 2: SpatialScore."""

    backbone: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", "hub id or folder of a Qwen2.5-VL model")
    instruction: str = setting(  # [ours]
        "Judge only whether the objects are placed as the text says.", "text put before the prompt; may be empty")
    dtype: str = setting("bfloat16", "dtype of the backbone; the head is always float32",  # [HPSv3]
                         choices=("float32", "bfloat16"))
    lora_rank: int = setting(64, "rank of the adapters on the language model's linears; 0 trains no adapter", ge=0)  # [VideoAlign]
    lora_alpha: int = setting(128, "scale of the adapters is alpha / rank", ge=1)  # [VideoAlign]
    train_merger: bool = setting(True, "train the vision-to-language merger")  # [VideoAlign]
    train_vision: bool = setting(True, "train the vision tower")  # [VideoAlign]
    head_width: int = setting(1024, "width of the head's first layer", ge=1)  # [HPSv3]
    head_hidden: int = setting(16, "width of the head's second layer", ge=1)  # [HPSv3]
    head_dropout: float = setting(0.05, "dropout after the head's first layer", ge=0, le=0.9)  # [HPSv3]
    loss: str = setting("gaussian", "Bradley-Terry on (mu, sigma) by quadrature or by sampling, or on mu alone",
                        choices=("gaussian", "sampled", "plain"))
    quadrature_nodes: int = setting(32, "Gauss-Hermite nodes of the gaussian loss", ge=4, le=128)  # [ours]
    max_pixels: int = setting(200_704, "pixels per image that the vision tower sees", ge=64)  # [HPSv3]
    max_text_tokens: int = setting(512, "longest prompt in tokens; a longer one is an error", ge=8)  # [ours]
    batch: int = setting(32, "pairs per update", ge=1)
    micro_batch: int = setting(4, "pairs per forward", ge=1)
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
    dtype: str = setting("bfloat16", "dtype of the model; latents and log-probs are always float32",  # [Flow-GRPO]
                         choices=("float32", "bfloat16"))
    resolution: int = setting(512, "height and width of the pictures in pixels", ge=16)  # [Flow-GRPO]
    guidance_scale: float = setting(3.5, "distilled guidance", ge=0)  # [Flow-GRPO]
    max_text_tokens: int = setting(256, "T5 tokens per prompt; a longer prompt is an error", ge=8)  # [ours]
    steps: int = setting(300, "RL steps (one update of the weights each)", ge=1)  # [ours]
    prompts_per_step: int = setting(24, "prompts per RL step (P)", ge=1)  # [Flow-GRPO]: 48 per epoch, 2 updates
    group: int = setting(24, "images per prompt (G)", ge=2)
    top_k: int = setting(6, "keep the k best and the k worst of a group; 0 keeps all", ge=0)
    stats_over: str = setting("kept", "mean and std of the rewards over the kept images or over the whole group",
                              choices=("kept", "group"))
    advantage_clip: float = setting(5.0, "advantages are clamped to +- this", gt=0)  # [Flow-GRPO]
    rollout_steps: int = setting(6, "denoising steps while training (T)", ge=1)
    eval_steps: int = setting(28, "denoising steps, without noise, for evaluation", ge=1)  # [Flow-GRPO]
    kernel: str = setting("sde", "transition kernel: Flow-SDE, CPS or Dance-SDE",  # the paper uses Flow-SDE
                          choices=("sde", "cps", "dance"))
    noise: float = setting(0.9, "noise level of the kernel", gt=0)  # [Flow-GRPO]
    train_from: int = setting(0, "first denoising step that is noisy and trained on", ge=0)  # [Flow-GRPO]
    train_steps: int = setting(5, "how many steps are noisy and trained on; the others are ODE steps", ge=1)  # [Flow-GRPO]: all but the last
    clip: float = setting(1e-4, "clip range of the ratio", gt=0)
    kl: float = setting(0.01, "weight of the KL to the base model", ge=0)
    lr: float = setting(3e-4, "learning rate of the adapter", gt=0)
    lora_rank: int = setting(32, "rank of the adapter", ge=1)
    lora_alpha: int = setting(64, "scale of the adapter is alpha / rank", ge=1)  # [Flow-GRPO]: twice the rank
    weight_decay: float = setting(1e-4, "AdamW weight decay", ge=0)  # [Flow-GRPO]
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this", gt=0)  # [Flow-GRPO]
    ema: float = setting(0.9, "decay of the averaged adapter that is evaluated and saved; 0 turns it off", ge=0, le=0.9999)  # [Flow-GRPO]
    ema_every: int = setting(8, "updates between two averagings", ge=1)  # [Flow-GRPO]
    micro_batch: int = setting(4, "trajectories per forward while updating", ge=1)  # [ours]
    sample_batch: int = setting(4, "trajectories per forward while sampling", ge=1)  # [ours]
    save_every: int = setting(10, "RL steps between two checkpoints", ge=1)  # [ours]
    gallery_every: int = setting(10, "RL steps between two galleries of the same prompts and seeds", ge=1)  # [ours]
    gallery_prompts: int = setting(8, "prompts of a gallery", ge=1)  # [ours]
    gate_tolerance: float = setting(1e-4, "largest |log ratio| of a replayed rollout before the first update", gt=0)  # [ours]
    relations: tuple[float, ...] = setting((0, 0, 503, 3348, 10572, 15572, 19054, 13829, 11056, 3430, 1428, 357),
                                           "relative frequency of training prompts with 1, 2, 3 ... relations")


@dataclass(frozen=True)
class BenchConfig:
    """Part 4: the in-domain comparison of the base and the tuned generator."""

    in_domain_prompts: int = setting(200, "held-out prompts with in_domain_relations", ge=2)  # [ours]
    hard_prompts: int = setting(200, "held-out prompts with hard_relations", ge=2)  # [ours]
    in_domain_relations: tuple[int, ...] = setting((3, 4, 5, 6), "numbers of relations of the in-domain set")  # [ours]
    hard_relations: tuple[int, ...] = setting((7, 8, 9, 10), "numbers of relations of the hard set")  # [ours]
    images_per_prompt: int = setting(1, "images per prompt and model, seeds 0, 1, ...", ge=1)  # [ours]
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
