"""What a part must be able to do to stand in a slot. Every call is keyword-only: nothing can be swapped by mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spatialt2i.core.types import Pair, Prompt, Rollout, Scores, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Parameter


class Writer(Protocol):
    """Writes perfect prompts and the perturbed prompts that go with them.

    Attributes:
        threads: how many calls it is good to have under way at a time; 1 where it computes instead of waiting.
        bill: what its calls have cost so far, see `spatialt2i.data.endpoint.Bill`; None where they are free.
    """

    threads: int
    bill: Callable[[], Any] | None

    def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
        """One prompt with ``n_relations`` relations."""
        ...

    def perturb(self, *, prompt: Prompt, n_edits: int, seed: int) -> Pair | None:
        """Change ``n_edits`` relations of ``prompt`` and what depends on them; None where no legal edit exists."""
        ...


class Generator(Protocol):
    """Draws pictures.

    Attributes:
        name: in records and tables.
        settings: what its pictures depend on besides prompt and seed, JSON-able.
    """

    name: str
    settings: dict[str, Any]

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Image | str]:
        """One RGB picture per prompt, or why there is none; the same prompt and seed give the same, in any batch."""
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
    """A generator whose denoising steps have log-probabilities, and an adapter that can be trained.

    Attributes:
        sigmas: float32 [T+1], the schedule of its rollouts.
    """

    sigmas: Tensor

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        """One RGB picture per prompt, see `Generator`."""
        ...

    def sample(self, *, prompts: Sequence[Prompt], group: int, seeds: Sequence[Sequence[int]]) -> Rollout:
        """G trajectories for each of P prompts, not decoded yet. seeds: [P][G]."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError for a prompt that the text encoders cannot read whole."""
        ...

    def decode(self, rollout: Rollout) -> list[list[Image]]:
        """The pictures [P][G] at the ends of the trajectories."""
        ...

    def log_prob(self, *, rollout: Rollout, rows: Tensor, reference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs with the current adapter: of single denoising steps, or of pictures noised to their levels.

        Args:
            rollout: where the latents are.
            rows: int64 [B, 3] on the CPU: prompt, image and step of each transition.
            reference: use the base model (adapter off), without gradient.

        Returns:
            log_prob [B], what was predicted [B, D S, C] (D predictions each), noise level [B] (which scales the KL).
        """
        ...

    def replay(self, *, rollout: Rollout, rows: Tensor, reference: bool = False) -> Tensor:
        """Log ratios [B] of drawn denoising steps to the same steps replayed; 0 where nothing changed since."""
        ...

    def parameters(self) -> dict[str, Parameter]:
        """The trainable parameters by name: the adapter's."""
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter so that the stock pipeline loads it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        ...
