"""Which of X-VLM's classes a model is."""

from __future__ import annotations

from torch import nn

from vlp_adapters.kinds import Classes, Kind, kind_among
from vlp_plugins.runtime.errors import UnsupportedError

MATCHING = (Kind.PRETRAINING, Kind.RETRIEVAL)
"""The kinds with a common space of images and texts and a matching head."""

_CLASSES: Classes = {
    "vlp_adapters.xvlm.modeling.XvlmForPretraining": Kind.PRETRAINING,
    "vlp_adapters.xvlm.modeling.XvlmForRetrieval": Kind.RETRIEVAL,
    "vlp_adapters.xvlm.captioning.XvlmForCaptioning": Kind.CAPTIONING,
    "vlp_adapters.xvlm.answering.XvlmForQuestionAnswering": Kind.VQA,
    "vlp_adapters.xvlm.nlvr.XvlmForNlvr": Kind.NLVR,
}


def kind_of(model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is no X-VLM."""
    return kind_among(_CLASSES, model)


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
