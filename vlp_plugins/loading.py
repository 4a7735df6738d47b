"""Loads a model and its adapter from a path or hub id."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from vlp_plugins.masks.sparse import is_sparse, sparse_model
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.architecture import (
    bounded,
    has_no_weights,
    load_config,
    loading_failure,
    meta_model,
    transformers_class,
)
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.registry import Registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnclaimedModelError, UnsupportedError, VlpError
from vlp_plugins.runtime.model_state import default_device, neutral_state
from vlp_plugins.structured.files import is_structured, rebuild

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MODULE = "module"
"""In place of the name of an adapter: `ModuleAdapter`, which takes any model."""

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


@neutral_state()
def load_model(
    source: str,
    *,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> tuple[nn.Module, Adapter]:
    """Loads a model in evaluation mode and finds its adapter.

    A folder of `save_structured` records its model and adapter. For any other source every adapter
    is first asked whether it knows the format (original checkpoints, models that transformers does
    not have); then transformers loads the class that the configuration names.

    Args:
        source: local folder, checkpoint file, or hub id.
        adapter: name of the adapter; None asks all; `module` describes any model by its layers.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`, `cuda`, ...; None takes a GPU if there is one.

    Raises:
        UnsupportedError: if the source cannot be loaded, it lacks weights that would be pruned, or
            there is no such device.
        UnclaimedModelError: if no adapter claims the model.
    """
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    target = default_device(device)
    source, known = _checked(source, adapter)
    missing: Sequence[str] = ()
    if is_structured(source):
        model, saved = rebuild(source)
        chosen = saved if adapter in (None, saved.name) else _adapter_of(model, known, adapter)
        return model.to(target, DTYPES[dtype]), chosen
    if is_sparse(source):
        model = sparse_model(source)
    else:
        found = (_load_by(known.adapter, name, source) for name in _names(known, adapter))
        first = next((model for model in found if model is not None), None)
        if first is None:
            first, missing = _from_transformers(source, DTYPES[dtype])
        model = first
    chosen = _adapter_of(model, known, adapter)
    _report_missing(source, model, chosen, missing)
    return model.to(target, DTYPES[dtype]).eval(), chosen


@neutral_state()
def load_structure(source: str, *, adapter: str | None = None) -> tuple[nn.Module, Adapter]:
    """A model to inspect: like `load_model`, but a folder needs a configuration only.

    Without weights the model is made on the meta device, which takes no memory.

    Args:
        source: as of `load_model`, or a `config.json`.
        adapter: as of `load_model`.

    Raises:
        UnsupportedError: if neither an adapter nor transformers knows the source.
        UnclaimedModelError: if no adapter claims the model.
    """
    path = Path(source).expanduser()
    if path.name == "config.json" and path.is_file():
        source, path = str(path.parent), path.parent
    if not has_no_weights(path):
        return load_model(source, adapter=adapter, device="cpu")
    known = registry()
    adapters = [known.adapter(name) for name in _names(known, adapter)]
    model = meta_model(str(path), adapters).eval()
    return model, _adapter_of(model, known, adapter)


def load_outline(source: str, *, adapter: str | None = None) -> tuple[nn.Module, Adapter]:
    """A model to check a run against: where a `config.json` describes it, on the meta device.

    Args:
        source: as of `load_model`.
        adapter: as of `load_model`.

    Raises:
        UnsupportedError: if `load_model` could not load it, as far as that shows without weights.
        UnclaimedModelError: if no adapter claims the model.
    """
    source, known = _checked(source, adapter)
    path = Path(source)
    described = path.is_dir() and (path / "config.json").is_file() and not has_no_weights(path)
    if not described or is_structured(source) or is_sparse(source):
        return load_model(source, adapter=adapter, device="cpu")
    with TemporaryDirectory() as bare:
        # An adapter that tries to load makes its classes known to transformers; from the whole
        # folder it would load the model.
        shutil.copy(path / "config.json", bare)
        for name in _names(known, adapter):
            with suppress(VlpError):
                _load_by(known.adapter, name, bare)
    try:
        with bounded(source):
            model = meta_model(source, ()).eval()
    except Exception:  # a format that only an adapter knows, or loading says what is wrong
        return load_model(source, adapter=adapter, device="cpu")
    return model, _adapter_of(model, known, adapter)


def _checked(source: str, adapter: str | None) -> tuple[str, Registry]:
    """The source with `~` expanded, and the registry, which has that adapter."""
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    known = registry()
    if adapter not in (None, MODULE):
        known.adapter(str(adapter))  # a misspelt name shows before the model is read
    # What is no id would take the hub long to refuse.
    if not Path(source).exists() and not _HUB_ID.fullmatch(source):
        raise UnsupportedError(f"model {source} does not exist; check the path")
    return source, known


def _names(known: Registry, adapter: str | None) -> Iterable[str]:
    return known.adapter_names() if adapter in (None, MODULE) else [str(adapter)]


def _load_by(find: Callable[[str], Adapter], name: str, source: str) -> nn.Module | None:
    """What one adapter loads; one that breaks does not stop the others."""
    try:
        return find(name).load(source)
    except (VlpError, MemoryError):
        raise  # it knows the format and says what is wrong
    except (Exception, SystemExit) as error:
        _log.warning("adapter %r was skipped: %s: %s", name, type(error).__name__, error)
        return None


def _adapter_of(model: nn.Module, known: Registry, adapter: str | None) -> Adapter:
    if adapter == MODULE:
        return ModuleAdapter(model)
    if adapter is not None:
        chosen = known.adapter(adapter)
        if not chosen.claims(model):
            raise UnclaimedModelError(
                f"adapter {adapter!r} does not know {type(model).__name__}; leave it out to have "
                f"all asked, or write {MODULE!r}, which takes any model"
            )
        return chosen
    try:
        return known.adapter_for(model)
    except UnclaimedModelError as error:
        raise UnclaimedModelError(
            f"{error}, on the command line with --adapter {MODULE}"
        ) from error


def _from_transformers(source: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """The model, and the parameters that the checkpoint lacks."""
    import transformers

    path = Path(source)
    if path.is_file() and (path.parent / "config.json").is_file():
        raise UnsupportedError(f"{source} is only part of a model; give the folder that it is in")
    if path.is_file():
        raise UnsupportedError(
            f"{source} is a checkpoint file that no adapter recognises; give a folder with "
            "config.json, or an original BLIP, X-VLM or CLIP checkpoint"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UnsupportedError(f"folder {source} has no config.json; give the model's own folder")
    try:
        loader = transformers_class(load_config(source)) or transformers.AutoModel
        with bounded(source):
            model, report = loader.from_pretrained(
                source, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except (VlpError, MemoryError):
        raise
    except Exception as error:  # damaged files raise what their parsers raise
        nowhere = "" if path.exists() else "there is no such file or folder, and as a hub id: "
        raise UnsupportedError(
            f"cannot load a model from {source!r}: {nowhere}{loading_failure(source, error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{source!r} holds {type(model).__name__}, which is no torch module")
    return model, sorted(report["missing_keys"])


def _report_missing(
    source: str, model: nn.Module, adapter: Adapter, missing: Sequence[str]
) -> None:
    """Raises if a checkpoint lacks prunable weights: transformers only warns, and draws them."""
    if not missing:
        return
    prunable = {alias for w in WeightMap.of(model, adapter).values() for alias in w.aliases}
    if drawn := [name for name in missing if name in prunable]:
        raise UnsupportedError(
            f"{source} lacks {len(drawn)} weights of {type(model).__name__} that would be pruned "
            f"(first: {drawn[0]}); it is a checkpoint of another model, or not a whole one"
        )
    _log.warning(
        "%s lacks %d parameters, which are new and random now (first: %s); none of them is pruned",
        source, len(missing), missing[0],
    )  # fmt: skip
