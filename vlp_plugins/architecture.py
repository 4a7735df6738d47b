"""A model from its configuration alone: every shape and name, and no memory for values."""

from __future__ import annotations

import os
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


def load_config(source: str | os.PathLike[str]) -> Any:
    """The configuration of a model as a class of transformers; code of the model is never run.

    Args:
        source: folder with a `config.json`, or hub id.

    Raises:
        UnsupportedError: if only code that comes with the model could read it.
        Exception: what transformers raises if it is missing or damaged.
    """
    import transformers

    source = os.fspath(source)
    raw, _ = transformers.PreTrainedConfig.get_config_dict(source)
    own = raw.get("auto_map")
    kind = raw.get("model_type")
    if isinstance(own, dict) and "AutoConfig" in own and kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            _code_refused(source, f"{own['AutoConfig']} for model type {kind!r}")
        )
    # None, the default, would ask on the terminal whether the code may run.
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)


def transformers_class(config: Any) -> Any:
    """The class of transformers that a configuration names; None without one."""
    import transformers

    name = next(iter(config.architectures or []), None)
    named = getattr(transformers, str(name), None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else None


def loading_failure(source: str, error: BaseException) -> str:
    """Why transformers could not load something, in one line."""
    if "trust_remote_code" in str(error):
        return _code_refused(source, "auto_map in its files")
    return first_line(error)


def _code_refused(source: str, what: str) -> str:
    import transformers

    return (
        f"{source} needs code of its own ({what}), which is never run here; take a version of the "
        f"model that is of a class of transformers (here {transformers.__version__}, a later one "
        "may have it), or, if you trust that code, load the model in Python with "
        "trust_remote_code=True and give it to vlp_plugins.prune"
    )


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
        config = load_config(source)
        named = transformers_class(config)
        with how:
            if named is not None:
                model = named(config)
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except VlpError:
        raise
    except Exception as error:  # configurations raise what their checks raise
        raise UnsupportedError(
            f"cannot make a model of {source}/config.json: {loading_failure(source, error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{source} describes {type(model).__name__}, no torch module")
    return model
