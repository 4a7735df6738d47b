"""BLIP: models of pre-training and NLVR2, and conversion from and to original checkpoints.

Nothing heavy is imported until a name is used, so that listing plug-ins stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_adapters.blip.configuration import BlipPretrainConfig as BlipPretrainConfig
    from vlp_adapters.blip.convert import load_original as load_original
    from vlp_adapters.blip.convert import save_original as save_original
    from vlp_adapters.blip.modeling import BlipForPretraining as BlipForPretraining
    from vlp_adapters.blip.nlvr_model import BlipForNlvr as BlipForNlvr

_HOMES = {
    "BlipForNlvr": "nlvr_model",
    "BlipForPretraining": "modeling",
    "BlipPretrainConfig": "configuration",
    "load_original": "convert",
    "save_original": "convert",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
