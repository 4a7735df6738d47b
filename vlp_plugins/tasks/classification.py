"""How often a model names the class of an image, or says whether a statement is true of two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, named_batches, to_device
from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    ClassifyingAdapter,
    RetrievalAdapter,
    StatementAdapter,
    need,
)
from vlp_plugins.runtime.errors import BatchError, DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model


@dataclass(frozen=True)
class Accuracy:
    """Accuracy at k in percent.

    Attributes:
        top: by k, the share of images whose class is among the first k.
        images: how many were measured.
        ahead: of every image, how many classes come before the right one.
    """

    top: dict[int, float]
    images: int
    ahead: tuple[int, ...] = field(default=(), compare=False, repr=False)


@takes_model
def classifies(model: nn.Module, adapter: Adapter, batches: Iterable[Batch]) -> bool:
    """Whether a model has a classifier, tried with the first batch; False if texts tell classes."""
    if not isinstance(adapter, RetrievalAdapter) or not isinstance(adapter, ClassifyingAdapter):
        return True
    batch = next(iter(batches))
    with evaluating(model) as device:
        try:
            adapter.classify(model, to_device(batch, device))
        except UnsupportedError:
            return False
    return True


@takes_model
def zero_shot(
    model: nn.Module, adapter: Adapter, batches: Iterable[Batch], prompts: Iterable[Batch]
) -> Accuracy:
    """Accuracy of taking the class whose prompt is most similar to the image.

    Radford et al. 2021 (arXiv:2103.00020), section 3.1, with a single prompt for each class, by its
    number. Batches have images and `labels`, `[B]` integers.

    Raises:
        UnsupportedError: if models of this family do not embed both in one space.
        BatchError: if labels are missing or do not fit.
        DataError: if there are no batches.
    """
    if not isinstance(adapter, RetrievalAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} embeds no images and texts in one space; take CLIP or SigLIP"
        )
    with evaluating(model) as device:
        classes = torch.cat(
            [adapter.text_features(model, to_device(batch, device)).float() for batch in prompts]
        )
        return _accuracy(
            (batch, adapter.image_features(model, to_device(batch, device)).float() @ classes.T)
            for batch in batches
        )


@takes_model
def classification(
    model: nn.Module, adapter: Adapter, batches: Iterable[Batch], *, ks: Sequence[int] = (1, 5)
) -> Accuracy:
    """Accuracy of a classifier at the cut-offs `ks`.

    Batches have images and `labels`, `[B]` integers. A wrong class that is as likely as the right
    one counts as ahead of it, and so does NaN.

    Raises:
        UnsupportedError: if models of this family have no classifier.
        BatchError: if labels are missing or do not fit.
        DataError: if there are no batches, or a cut-off is below 1.
    """
    if not isinstance(adapter, ClassifyingAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} does not say how its models classify images; take an image "
            "classifier such as ViTForImageClassification"
        )
    check_batches(batches)
    with evaluating(model) as device:
        found = (
            (batch, adapter.classify(model, to_device(batch, device)).float())
            for batch in named_batches(batches, adapter)
        )
        return _accuracy(found, ks)


def _accuracy(found: Iterable[tuple[Batch, Tensor]], ks: Sequence[int] = (1, 5)) -> Accuracy:
    """Accuracy of logits `[B, C]`, each with the batch that has the labels."""
    if not ks or min(ks) < 1:
        raise DataError(f"accuracy at k needs cut-offs from 1 on, not {list(ks)}")
    ahead_of: list[int] = []
    for batch, logits in found:
        (labels,) = need(batch, "labels")
        labels = labels.to(logits.device)
        rows, classes = logits.shape
        if labels.shape != (rows,) or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise BatchError(
                f"labels {list(labels.shape)} from {int(labels.min())} to "
                f"{int(labels.max())} do not fit {rows} images and {classes} classes; the "
                "model must have been trained on the classes of this data"
            )
        own = logits.gather(1, labels[:, None])
        # The right class itself is never below itself.
        ahead = (~(logits < own)).sum(dim=1) - 1
        ahead = ahead + own[:, 0].isnan() * classes
        ahead_of += ahead.tolist()
    if not ahead_of:
        raise DataError("there are no batches to measure classification on")
    images = len(ahead_of)
    top = {k: 100 * sum(ahead < k for ahead in ahead_of) / images for k in ks}
    return Accuracy(top, images, tuple(ahead_of))


@takes_model
def statement_accuracy(
    model: nn.Module, adapter: Adapter, batches: Iterable[Batch]
) -> tuple[float, ...]:
    """Of every statement 100 if the model judges it rightly, else 0; the mean is the accuracy.

    NLVR2 (Suhr et al. 2019). Log-odds above 0 say "true", others "false". NaN is wrong. Batches are
    those of `StatementAdapter`, with `labels`.

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
