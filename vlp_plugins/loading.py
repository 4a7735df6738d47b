"""From a path or hub id to a model and its adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.errors import UnsupportedError, VlpError
from vlp_plugins.plugins import registry

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str,
    *,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> tuple[nn.Module, Adapter]:
    """Loads a model in evaluation mode and finds its adapter.

    Every adapter is first asked whether it knows the format (original checkpoints, models that
    transformers does not have); then transformers loads the class that the configuration names.

    Args:
        source: local folder, checkpoint file, or hub id.
        adapter: name of the adapter; None asks all.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`, `cuda`, ...; None takes a GPU if there is one.

    Raises:
        UnsupportedError: if nobody can load the source.
        UnclaimedModelError: if no adapter claims the model.
    """
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    known = registry()
    names = [adapter] if adapter else known.adapter_names()
    found = (_asked(known.adapter, name, source) for name in names)
    model = next((model for model in found if model is not None), None)
    if model is None:
        model = _from_transformers(source)
    chosen = known.adapter(adapter) if adapter else known.adapter_for(model)
    return model.to(default_device(device), DTYPES[dtype]).eval(), chosen


def _asked(find: Callable[[str], Adapter], name: str, source: str) -> nn.Module | None:
    """What one adapter loads; an adapter that breaks must not keep the others from it."""
    try:
        return find(name).load(source)
    except VlpError:
        raise  # it knows the format and says what is wrong
    except Exception as error:
        _log.warning("adapter %r was skipped: %s: %s", name, type(error).__name__, error)
        return None


def default_device(device: str | None) -> torch.device:
    """The device of that name; None takes a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _from_transformers(source: str) -> nn.Module:
    import transformers

    path = Path(source)
    if path.is_file():
        raise UnsupportedError(
            f"{source} is a checkpoint file that no adapter recognises; give a folder with "
            "config.json, or an original BLIP or X-VLM checkpoint"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UnsupportedError(f"folder {source} has no config.json; give the model's own folder")
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source)
        name = next(iter(config.architectures or []), None)
        loader = getattr(transformers, name, None) if name else None
        model = (loader or transformers.AutoModel).from_pretrained(source)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"cannot load a model from {source!r}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{source!r} holds {type(model).__name__}, which is no torch module")
    return model
