"""Which of BLIP's classes a model is, and what differs among them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from torch import Tensor, nn

from vlp_adapters.blip.passes import begin_with


class Kind(StrEnum):
    """The classes that the adapter claims; the value is the task where there is one."""

    PRETRAINING = "pretraining"
    RETRIEVAL = "retrieval"
    CAPTIONING = "captioning"
    VQA = "vqa"
    DUAL = "dual encoder"  # two towers that meet in the contrastive loss only
    VISION = "vision"
    TEXT = "text"


# Compared as text, so that asking about another model does not import transformers.
_TRANSFORMERS = "transformers.models.blip.modeling_blip"
_CLASSES = {
    "vlp_adapters.blip.modeling.BlipForPretraining": Kind.PRETRAINING,
    f"{_TRANSFORMERS}.BlipForImageTextRetrieval": Kind.RETRIEVAL,
    f"{_TRANSFORMERS}.BlipForConditionalGeneration": Kind.CAPTIONING,
    f"{_TRANSFORMERS}.BlipForQuestionAnswering": Kind.VQA,
    f"{_TRANSFORMERS}.BlipModel": Kind.DUAL,
    f"{_TRANSFORMERS}.BlipVisionModel": Kind.VISION,
    f"{_TRANSFORMERS}_text.BlipTextModel": Kind.TEXT,
}


def kind_of(model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is no BLIP."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((_CLASSES[name] for name in names if name in _CLASSES), None)


def text_config(model: Any) -> Any:
    """The configuration of the text towers of any kind that has one."""
    return getattr(model.config, "text_config", model.config)


def encoder_ids(model: Any, input_ids: Tensor) -> Tensor:
    """What the multimodal encoder reads: the pre-training model begins with [ENC].

    transformers' classes keep [CLS], as the forward of the published matching model does.
    """
    if kind_of(model) is Kind.PRETRAINING:
        return begin_with(input_ids, model.config.enc_token_id)
    return input_ids


def decoder_ids(model: Any, input_ids: Tensor) -> Tensor:
    """What a decoder reads: [DEC] first, in every kind.

    transformers' forward leaves that to the caller; its generation and the published training
    begin with it.
    """
    return begin_with(input_ids, text_config(model).bos_token_id)
