"""A model from its configuration alone: every shape and name, and no memory for values."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.errors import UnsupportedError, VlpError, first_line

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")


def has_no_weights(path: Path) -> bool:
    """True for a folder with a `config.json` and no file of weights."""
    if not (path / "config.json").is_file():
        return False
    return not any(next(path.glob(pattern), None) for pattern in _WEIGHTS)


def meta_model(source: str, adapters: Iterable[Adapter]) -> nn.Module:
    """Makes the model that a configuration describes on the meta device; see `unfilled_model`."""
    return _made(source, adapters, torch.device("meta"))


def unfilled_model(source: str, adapters: Iterable[Adapter]) -> nn.Module:
    """Makes the model that a configuration describes on the CPU, with ties.

    Its weights hold whatever was in memory: nothing is drawn. What the configuration alone decides,
    such as tables of positions, is there.

    Args:
        source: folder with a `config.json`.
        adapters: those whose families transformers may not know.

    Raises:
        UnsupportedError: if the configuration is damaged or of an unknown model.
    """
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]):  # some constructors draw all the same
        model = _made(source, adapters, no_init_weights())
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()  # left out together with the drawing
    return model


def _made(
    source: str, adapters: Iterable[Adapter], how: AbstractContextManager[object]
) -> nn.Module:
    import transformers

    for adapter in adapters:
        # Being asked, an adapter of this format makes its classes known to transformers before it
        # finds that the weights are missing.
        with suppress(VlpError):
            adapter.load(source)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source)
        name = next(iter(config.architectures or []), None)
        named = getattr(transformers, name, None) if name else None
        with how:
            model = named(config) if named else transformers.AutoModel.from_config(config)
    except Exception as error:  # configurations raise what their checks raise
        raise UnsupportedError(
            f"cannot make a model of {source}/config.json: {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{source} describes {type(model).__name__}, no torch module")
    return model
