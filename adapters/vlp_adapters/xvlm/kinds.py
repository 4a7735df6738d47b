"""Which of X-VLM's classes a model is."""

from __future__ import annotations

from enum import StrEnum

from torch import nn

from vlp_plugins.runtime.errors import UnsupportedError


class Kind(StrEnum):
    """The classes that the adapter claims; the value is the task."""

    PRETRAINING = "pretraining"
    CAPTIONING = "captioning"
    VQA = "vqa"


# Compared as text, so that asking about another model does not import transformers.
_CLASSES = {
    "vlp_adapters.xvlm.modeling.XvlmForPretraining": Kind.PRETRAINING,
    "vlp_adapters.xvlm.captioning.XvlmForCaptioning": Kind.CAPTIONING,
    "vlp_adapters.xvlm.answering.XvlmForQuestionAnswering": Kind.VQA,
}


def kind_of(model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is no X-VLM."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((_CLASSES[name] for name in names if name in _CLASSES), None)


def require(model: nn.Module, kind: Kind, what: str) -> None:
    """Checks that a model is of a kind.

    Raises:
        UnsupportedError: if it is of another one; says what it cannot do.
    """
    if kind_of(model) is not kind:
        raise UnsupportedError(
            f"{type(model).__name__} {what}; load X-VLM's {kind} model"
            + ("" if kind is Kind.PRETRAINING else ", or make it with from_pretraining()")
        )
