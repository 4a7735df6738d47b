"""What a user may set of CHITA and CHITA++, and what is taken otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from vlp_plugins.methods.chita.rows.plan import KEEP_IN
from vlp_plugins.methods.chita.solver.elimination import MANY_ROWS
from vlp_plugins.methods.chita.solver.solve import Effort
from vlp_plugins.models.registry import public_name
from vlp_plugins.runtime.errors import UnsupportedError, suggest

Lambda = float | Literal["auto"]
BlockSize = int | Literal["default"] | None
FirstOrder = bool | float | Literal["default"]

DEFAULT_LAMBDA: Lambda = "auto"
DEFAULT_EFFORT: Effort = "fast"
DEFAULT_BLOCK_SIZE: int | None = 2_000
PUBLISHED_BLOCK_SIZE = 10_000
_COLUMNS_PER_ROW = 16
"""Of a default block of many rows, so that its n x n systems cost less than its products."""
DEFAULT_HELD_OUT = 0.2
DEFAULT_ROUNDS = 8
DEFAULT_SCHEDULE = "exp"
DEFAULT_GRADIENT_WEIGHT = 0.75
"""Of gradients against the Gram matrix, block by block; chosen by the held-out loss of a chat
model, see `docs/decisions.md`."""

EFFORTS: tuple[Effort, ...] = get_args(Effort)
ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

MOST_HELD_OUT = 32
"""Batches held out by a fraction: beyond that, more data costs time and changes no choice."""


@dataclass(frozen=True)
class Settings:
    """Of one run of the solver and of what it reads.

    Attributes:
        lambda_: ridge penalty above 0, or `auto`: chosen on held-out calibration batches.
        effort: of the solver: `published`, `fast` or `best`.
        block_size: columns of a block of the block-diagonal approximation; None: one problem over
            all weights. `default` is that of the variant, see `for_rows`.
        first_order: weight of the first-order term; True: 1 / (samples of the first batch);
            False: 0. `default` is that of the variant: True if published, else False.
        rows: number of rows, one batch each; None: as many as there are batches.
        keep_in: where rows are kept; see `vlp_plugins.methods.chita.rows`.
        row_dtype: `float32` or `bfloat16`.
        held_out: batches that `auto` judges by: a fraction of them below 1, or their number.
    """

    lambda_: Lambda = DEFAULT_LAMBDA
    effort: Effort = DEFAULT_EFFORT
    block_size: BlockSize = "default"
    first_order: FirstOrder = "default"
    rows: int | None = None
    keep_in: str = "auto"
    row_dtype: str = "float32"
    held_out: float = DEFAULT_HELD_OUT

    def __post_init__(self) -> None:
        object.__setattr__(self, "lambda_", _lambda_of(self.lambda_))
        _one_of(self.effort, "effort", EFFORTS)
        _one_of(self.keep_in, "keep_in", KEEP_IN)
        _one_of(self.row_dtype, "row_dtype", tuple(ROW_DTYPES))
        blocks = None if self.block_size == "default" else self.block_size
        for name, count in (("block_size", blocks), ("rows", self.rows)):
            if count is not None and (type(count) is not int or count < 1):
                raise UnsupportedError(f"{name}={count!r}; give a whole number from 1 on, or none")
        first = False if self.first_order == "default" else self.first_order
        if not _number(first) or not 0 <= first < float("inf"):
            raise UnsupportedError(
                f"first_order={self.first_order!r}; give true, false or a weight from 0 on"
            )
        held = self.held_out
        if not _number(held) or not (0 < held < 1 or (held >= 1 and held == int(held))):
            raise UnsupportedError(
                f"held_out={held!r}; give a fraction of the batches between 0 and 1, or a number "
                "of them"
            )

    @property
    def auto(self) -> bool:
        """Whether lambda is to be chosen."""
        return self.lambda_ == "auto"

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return ROW_DTYPES[self.row_dtype]

    @property
    def columns_of_block(self) -> int | None:
        """Columns of a block; None for the full problem."""
        return DEFAULT_BLOCK_SIZE if self.block_size == "default" else self.block_size

    def for_variant(self, *, published: bool) -> Settings:
        """These, or in the published variant what the published code does."""
        first_order = published if self.first_order == "default" else self.first_order
        if not published:
            return replace(self, first_order=first_order)
        given = self.block_size
        blocks = PUBLISHED_BLOCK_SIZE if given in ("default", None) else given
        return replace(self, effort="published", block_size=blocks, first_order=first_order)

    def for_rows(self, n: int) -> Settings:
        """These, with the default block size of so many rows: larger where elimination estimates.

        Of 1,000 rows, blocks of 16,000 columns take half the time of those of 2,000, and both the
        objective and the loss on other data are lower.
        """
        size = self.columns_of_block
        if self.block_size == "default" and n > MANY_ROWS and self.effort == "fast":
            size = _COLUMNS_PER_ROW * n
        return replace(self, block_size=size)

    def first_order_of(self, samples: int) -> float:
        """The weight c of the first-order term; `"default"` is that of the default variant, 0.

        Args:
            samples: in the first batch.
        """
        if self.first_order == "default":
            return 0.0
        return 1 / samples if self.first_order is True else float(self.first_order)

    def held_out_of(self, batches: int) -> int:
        """How many of the batches are held out; 0 if lambda is given."""
        if not self.auto:
            return 0
        if self.held_out >= 1:
            return int(self.held_out)
        return max(1, min(MOST_HELD_OUT, int(self.held_out * batches)))

    def check_layers(self, method: str) -> None:
        """Raises `UnsupportedError` for what a problem of one layer does not have."""
        usual = Settings().parameters()
        for name, value in self.parameters().items():
            if name not in ("rows", "row_dtype") and value != usual[name]:
                raise UnsupportedError(
                    f"{name}={value!r} is of the problem of the whole model; with walk='blocks' "
                    f"method {method!r} takes gradient_weight, rows and row_dtype: leave it out"
                )

    def parameters(self) -> dict[str, Any]:
        """By the names that users give them."""
        return {public_name(name): value for name, value in vars(self).items()}


def _lambda_of(value: object) -> Lambda:
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        raise UnsupportedError(f"lambda={value!r}; give a number above 0, or auto")
    if not _number(value) or isinstance(value, bool) or not 0 < value < float("inf"):  # type: ignore[operator]
        raise UnsupportedError(
            f"lambda={value!r}; the ridge penalty must be a number above 0 (0.1 is a good start), "
            "or auto"
        )
    return float(value)  # type: ignore[arg-type]


def _number(value: object) -> bool:
    return isinstance(value, int | float)


def _one_of(value: str, name: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnsupportedError(f"{name}={value!r} is unknown{suggest(str(value), list(known))}")
