"""X-VLM: pre-training and downstream models, original checkpoints, token masking.

Nothing heavy is imported until a name is used, so that listing plug-ins stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_adapters.xvlm.answering import XvlmAnsweringConfig as XvlmAnsweringConfig
    from vlp_adapters.xvlm.answering import XvlmForQuestionAnswering as XvlmForQuestionAnswering
    from vlp_adapters.xvlm.captioning import XvlmCaptioningConfig as XvlmCaptioningConfig
    from vlp_adapters.xvlm.captioning import XvlmForCaptioning as XvlmForCaptioning
    from vlp_adapters.xvlm.configuration import XvlmPretrainConfig as XvlmPretrainConfig
    from vlp_adapters.xvlm.configuration import XvlmRetrievalConfig as XvlmRetrievalConfig
    from vlp_adapters.xvlm.convert import load_original as load_original
    from vlp_adapters.xvlm.convert import save_original as save_original
    from vlp_adapters.xvlm.masking import mask_tokens as mask_tokens
    from vlp_adapters.xvlm.modeling import XvlmForPretraining as XvlmForPretraining
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval as XvlmForRetrieval
    from vlp_adapters.xvlm.nlvr import XvlmForNlvr as XvlmForNlvr
    from vlp_adapters.xvlm.nlvr import XvlmNlvrConfig as XvlmNlvrConfig

_HOMES = {
    "XvlmAnsweringConfig": "answering",
    "XvlmCaptioningConfig": "captioning",
    "XvlmForCaptioning": "captioning",
    "XvlmForNlvr": "nlvr",
    "XvlmForPretraining": "modeling",
    "XvlmForQuestionAnswering": "answering",
    "XvlmForRetrieval": "modeling",
    "XvlmNlvrConfig": "nlvr",
    "XvlmPretrainConfig": "configuration",
    "XvlmRetrievalConfig": "configuration",
    "load_original": "convert",
    "mask_tokens": "masking",
    "save_original": "convert",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
