"""How a model is fine-tuned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlp_plugins.finetuning.rates import rate_by_name
from vlp_plugins.runtime.errors import RecipeError
from vlp_plugins.runtime.model_state import autocast_of


@dataclass(frozen=True)
class FinetuneSettings:
    """AdamW (Loshchilov & Hutter, ICLR 2019), and how its learning rate falls.

    Attributes:
        learning_rate: the highest.
        betas: of the averages of gradients and of their squares.
        epsilon: of AdamW.
        weight_decay: of matrices; vectors (biases, normalisation) are not decayed.
        schedule: `cosine`, `linear` or `constant`; see `vlp_plugins.finetuning.rates`.
        warmup: fraction of the steps in which the rate rises.
        epochs: how often the data is read.
        steps: of the optimizer; None: as many as the epochs have.
        accumulate: batches of a process whose gradients make one step.
        clip: largest norm of the gradient of a step; None leaves it.
        autocast: `bfloat16` or `float16` for the forward pass; None for float32.
        seed: of dropout.
    """

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.0
    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    clip: float | None = None
    autocast: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            RecipeError: if one is out of range.
            UnsupportedError: if the precision is unknown.
        """
        rate_by_name(self.schedule)
        autocast_of(self.autocast)
        for name, value, fine, wanted in (
            ("learning rate", self.learning_rate, self.learning_rate > 0, "above 0"),
            ("weight decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("epsilon", self.epsilon, self.epsilon > 0, "above 0"),
            ("betas", self.betas, all(0 <= b < 1 for b in self.betas), "from 0 to below 1"),
            ("warm-up", self.warmup, 0 <= self.warmup < 1, "a fraction, from 0 to below 1"),
            ("number of epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("number of steps", self.steps, self.steps is None or self.steps >= 1, "1 or more"),
            ("accumulated batches", self.accumulate, self.accumulate >= 1, "1 or more"),
            ("norm to clip at", self.clip, self.clip is None or self.clip > 0, "above 0"),
        ):
            if not fine:
                raise RecipeError(f"the {name} must be {wanted}, not {value}")

    def as_dict(self) -> dict[str, Any]:
        """The values as JSON keeps them."""
        return asdict(self) | {"betas": list(self.betas)}
