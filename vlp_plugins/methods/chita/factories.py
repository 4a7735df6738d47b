"""The methods as users name them and their parameters."""

from __future__ import annotations

from vlp_plugins.methods.chita.procedure import Chita
from vlp_plugins.methods.chita.settings import (
    DEFAULT_EFFORT,
    DEFAULT_HELD_OUT,
    DEFAULT_LAMBDA,
    DEFAULT_ROUNDS,
    DEFAULT_SCHEDULE,
    BlockSize,
    FirstOrder,
    Lambda,
    Settings,
)
from vlp_plugins.methods.chita.stages import ChitaInStages
from vlp_plugins.solvers.solve import Effort


def chita(
    *,
    lambda_: Lambda = DEFAULT_LAMBDA,
    effort: Effort = DEFAULT_EFFORT,
    block_size: BlockSize = "default",
    first_order: FirstOrder = "default",
    rows: int | None = None,
    keep_in: str = "auto",
    row_dtype: str = "float32",
    held_out: float = DEFAULT_HELD_OUT,
) -> Chita:
    """CHITA (Benbaki et al., ICML 2023): prunes by a quadratic model of the loss, updates the rest.

    Args:
        lambda_: ridge penalty above 0, or `auto`; users call it `lambda`. The result is very
            sensitive to it.
        effort: of the solver, `fast` or `best`; `published` is the support of the published one.
        block_size: columns of a block of the block-diagonal approximation; None for none.
        first_order: weight of the first-order term; True: 1 / (samples of the first batch), False:
            none. `default` is False, and True in the published variant. With that weight the model
            of the loss lets every row fall by up to 1 / samples, in every block: with batches of
            one sample this can destroy a model that is trained well, in the published solver too.
        rows: batches to take gradients of; None: all that are not held out.
        keep_in: where gradients are kept: `auto`, `ram`, `disk`, or nowhere, in several `passes`.
        row_dtype: `float32`, or `bfloat16` for half the memory and less accuracy.
        held_out: what `auto` judges by: a fraction of the batches below 1, or their number.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    return Chita(
        Settings(lambda_, effort, block_size, first_order, rows, keep_in, row_dtype, held_out)
    )


def chita_plus_plus(
    *,
    lambda_: Lambda = DEFAULT_LAMBDA,
    effort: Effort = DEFAULT_EFFORT,
    block_size: BlockSize = "default",
    first_order: FirstOrder = "default",
    rows: int | None = None,
    keep_in: str = "auto",
    row_dtype: str = "float32",
    held_out: float = DEFAULT_HELD_OUT,
    rounds: int = DEFAULT_ROUNDS,
    schedule: str = DEFAULT_SCHEDULE,
) -> ChitaInStages:
    """CHITA++ (Benbaki et al., ICML 2023): CHITA in rounds, with fresh gradients in each.

    Args:
        lambda_: see `chita`; `auto` chooses in the first round, and near that in the others.
        effort: see `chita`.
        block_size: see `chita`.
        first_order: see `chita`.
        rows: batches of one round; None: an equal share of all that are not held out.
        keep_in: see `chita`.
        row_dtype: see `chita`.
        held_out: see `chita`.
        rounds: number of rounds.
        schedule: how sparsity rises to the target; see `vlp_plugins.schedules`.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    settings = Settings(
        lambda_, effort, block_size, first_order, rows, keep_in, row_dtype, held_out
    )
    return ChitaInStages(settings, rounds, schedule)
