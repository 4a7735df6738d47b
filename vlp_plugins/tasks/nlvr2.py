"""NLVR2 (Suhr et al. 2019): does a model know whether a statement is true of two images?"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.models.adapter import Adapter, Batch, StatementAdapter, need
from vlp_plugins.runtime.errors import BatchError, DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model


@takes_model
def statement_accuracy(
    model: nn.Module, adapter: Adapter, batches: Iterable[Batch]
) -> tuple[float, ...]:
    """Of every statement 100 if the model judges it rightly, else 0; the mean is the accuracy.

    Log-odds above 0 say "true", others "false". NaN is wrong.

    Args:
        model: is left in the mode it was in.
        adapter: judges with the model.
        batches: see `StatementAdapter`; with `labels`.

    Raises:
        UnsupportedError: if models of this family judge no statements.
        BatchError: if labels are missing, or do not fit.
        DataError: if there are no batches.
    """
    if not isinstance(adapter, StatementAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} does not say how its models judge statements about two "
            "images; take a model of NLVR2, such as BLIP's model_base_nlvr.pth"
        )
    right: list[float] = []
    check_batches(batches)
    with evaluating(model) as device:
        for batch in batches:
            (labels,) = need(batch, "labels")
            odds = adapter.judge(model, to_device(batch, device)).float().cpu()
            labels = labels.cpu()
            if labels.shape != odds.shape or not ((labels == 0) | (labels == 1)).all():
                raise BatchError(
                    f"labels {list(labels.shape)} from {int(labels.min())} to {int(labels.max())} "
                    f"do not fit {len(odds)} statements; give 1 (true) or 0 (false) for each"
                )
            correct = ((odds > 0) == (labels == 1)) & ~odds.isnan()
            right += (100.0 * correct).tolist()
    if not right:
        raise DataError("there are no batches to measure nlvr2 on")
    return tuple(right)
