"""Which of X-VLM's classes a model is."""

from __future__ import annotations

from enum import StrEnum

from torch import nn

from vlp_plugins.runtime.errors import UnsupportedError


class Kind(StrEnum):
    """The classes that the adapter claims; the value is the task."""

    PRETRAINING = "pretraining"
    RETRIEVAL = "retrieval"
    CAPTIONING = "captioning"
    VQA = "vqa"
    NLVR = "nlvr2"


MATCHING = (Kind.PRETRAINING, Kind.RETRIEVAL)
"""The kinds with a common space of images and texts and a matching head."""

# Compared as text, so that asking about another model does not import transformers.
_CLASSES = {
    "vlp_adapters.xvlm.modeling.XvlmForPretraining": Kind.PRETRAINING,
    "vlp_adapters.xvlm.modeling.XvlmForRetrieval": Kind.RETRIEVAL,
    "vlp_adapters.xvlm.captioning.XvlmForCaptioning": Kind.CAPTIONING,
    "vlp_adapters.xvlm.answering.XvlmForQuestionAnswering": Kind.VQA,
    "vlp_adapters.xvlm.nlvr.XvlmForNlvr": Kind.NLVR,
}


def kind_of(model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is no X-VLM."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((_CLASSES[name] for name in names if name in _CLASSES), None)


def require(model: nn.Module, kinds: Kind | tuple[Kind, ...], what: str) -> None:
    """Checks that a model is of a kind, or of one of several.

    Raises:
        UnsupportedError: if it is of another one; says what it cannot do.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if kind_of(model) not in kinds:
        raise UnsupportedError(
            f"{type(model).__name__} {what}; load X-VLM's {' or '.join(kinds)} model"
            + ("" if Kind.PRETRAINING in kinds else ", or make it with from_pretraining()")
        )
