"""What a part must be able to do to stand in a slot. Every call is keyword-only: images and prompts cannot be swapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spatialt2i.core.types import Pair, Prompt, Rollout, Scores, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Parameter


class Writer(Protocol):
    """Writes perfect prompts and the perturbed prompts that go with them."""

    def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
        """One prompt with ``n_relations`` relations."""
        ...

    def perturb(self, *, prompt: Prompt, n_edits: int, seed: int) -> Pair | None:
        """Change ``n_edits`` relations of ``prompt`` and what depends on them; None where no legal edit exists."""
        ...


class Generator(Protocol):
    """Draws pictures."""

    name: str

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        """One RGB picture per prompt; the same prompt and seed give the same picture, in any batch."""
        ...


class Verifier(Protocol):
    """Judges pictures: the oracle of the tiny world, a VLM, or people."""

    name: str

    def verify(self, *, images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Verdict]:
        """One verdict per picture; what could not be judged is None in it."""
        ...


class Scorer(Protocol):
    """Gives pictures a number. Ours, foreign, or remote."""

    name: str

    def score(self, *, images: Sequence[Image], prompts: Sequence[Prompt] | Sequence[str]) -> Scores:
        """Scores of B pictures, each under its own prompt; independent of batch size and order."""
        ...


class Policy(Generator, Protocol):
    """A generator whose denoising steps have log-probabilities, and an adapter that can be trained."""

    def sample(self, *, prompts: Sequence[Prompt], group: int, seeds: Sequence[Sequence[int]]) -> Rollout:
        """G trajectories for each of P prompts. seeds: [P][G]."""
        ...

    def log_prob(self, *, rollout: Rollout, index: Tensor, step: int, reference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Replay one denoising step of B trajectories with the current adapter (or without it).

        Args:
            rollout: where the latents are.
            index: int64 [B, 2], (prompt, image) of each trajectory.
            step: which of the T steps.
            reference: use the base model (adapter off).

        Returns:
            log_prob [B], transition mean [B, S, C], noise std (0-d, schedule std without sqrt(dt) comes from `rl.sde`).
        """
        ...

    def parameters(self) -> list[Parameter]:
        """The trainable parameters: the adapter's."""
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter so that the stock pipeline loads it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        ...
