"""A model from its configuration alone: every shape and name, and no memory for values."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.runtime.artifacts import check_unpacked, stored_tensors
from vlp_plugins.runtime.errors import UnsupportedError, VlpError, first_line
from vlp_plugins.runtime.untrusted import check_inside, check_read, is_file

_ATTENTION = "attn_implementation"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_LEAST_BITS = 64  # a file may have one bit of an element that takes 64: sparse, or quantized
# Far above any model: a module per layer, and tables of positions, are made before weights are.
_MOST_LAYERS, _LAYERS = 10_000, re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)$")
_MOST_SIZE = 2**27
# What checkpoints in the format of their authors are called, and the class that transformers has.
_OWN_CLASSES = {
    "internvl_chat": "InternVLForConditionalGeneration",
    "llava_llama": "LlavaForConditionalGeneration",
    "llava_mistral": "LlavaNextForConditionalGeneration",
    "llava_qwen": "LlavaOnevisionForConditionalGeneration",
    "minicpmv": "MiniCPMV4_6ForConditionalGeneration",
    "molmo": "Molmo2ForConditionalGeneration",
    "multi_modality": "JanusForConditionalGeneration or DeepseekVLForConditionalGeneration",
    "ovis": "Ovis2ForConditionalGeneration",
    "phi4mm": "Phi4MultimodalForCausalLM",
}
_SIZE = re.compile(r"^(num|n)_|(^|_)(size|dims?|width|channels|embeddings|positions|patches)$")


def has_no_weights(path: Path) -> bool:
    """True for a folder with a `config.json` and no file of weights."""
    if not (path / "config.json").is_file():
        return False
    return not any(next(path.glob(pattern), None) for pattern in _WEIGHTS)


def load_config(source: str | os.PathLike[str]) -> Any:
    """The configuration of a folder or hub id as a class of transformers; its code is never run.

    Raises:
        UnsupportedError: if only code that comes with the model could read it, its weights are
            quantized, or its sizes are those of no model.
        Exception: what transformers raises if it is missing or damaged.
    """
    import transformers

    source = os.fspath(source)
    raw = _raw_config(source)
    own = raw.get("auto_map")
    kind = raw.get("model_type")
    _check_not_quantized(source, raw)
    if kind in _OWN_CLASSES and kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            f"{source} is a {kind} in the format of its authors, which needs their code; take a "
            f"checkpoint of the class {_OWN_CLASSES[kind]} of transformers (its name often ends in "
            "-hf)"
        )
    if isinstance(own, dict) and "AutoConfig" in own and kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(code_refused(source, f"{own['AutoConfig']} for model type {kind!r}"))
    # None, the default, would ask on the terminal whether the code may run.
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def bounded(source: str | os.PathLike[str], *, values: bool = True) -> Iterator[None]:
    """Within it, a model that is made or loaded takes no more than its files of weights can fill.

    Of a hub id, whose files may not be there yet, nothing is checked. The files themselves are
    where their `values` will be read.

    Raises:
        UnsupportedError: if the configuration describes a model that is far larger than what the
            folder has, or the folder names weights of others.
        Exception: what transformers raises if the configuration is missing or damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        yield
        return
    _raw_config(os.fspath(source))
    if values:
        _check_weights(folder)
    files = (path for pattern in _WEIGHTS for path in folder.glob(pattern))
    stored = _LEAST_BITS * sum(path.stat().st_size for path in files)
    taken = 0

    def count(_: nn.Module, __: str, tensor: torch.Tensor | None) -> None:
        nonlocal taken
        if tensor is not None:
            taken += tensor.numel() * tensor.element_size()
            what = f"the model that {folder / 'config.json'} describes"
            check_read(what, taken, UnsupportedError, stored=stored)

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_weights(folder: Path) -> None:
    """Raises `UnsupportedError` if shards are missing, damaged, elsewhere, or unpack to more."""
    for index in folder.glob("*.index.json"):
        check_read(str(index), index.stat().st_size, UnsupportedError)
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # transformers will say so
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            for shard in named:
                check_inside(folder / shard, folder, index, UnsupportedError)
            missing = sorted(shard for shard in named if not is_file(folder / shard))
            if missing and len(missing) < len(named):
                raise UnsupportedError(
                    f"{folder} lacks {len(missing)} of the {len(named)} shards that {index.name} "
                    f"names (first: {missing[0]}); copy it again"
                )
            for shard in named - {*missing}:
                if shard.endswith(".safetensors"):
                    stored_tensors(folder / shard)
    if is_file(whole := folder / "model.safetensors"):
        stored_tensors(whole)
    for path in folder.glob("*.bin"):
        check_unpacked(path, UnsupportedError)


def _raw_config(source: str) -> dict[str, Any]:
    """What a configuration says, before anything is made of it."""
    import transformers

    file = Path(source) / "config.json"
    if file.is_file():
        check_read(str(file), file.stat().st_size, UnsupportedError)
    raw: dict[str, Any] = transformers.PreTrainedConfig.get_config_dict(source)[0]
    for name, value in _values(raw, ""):
        if name.endswith(_ATTENTION) and "/" in str(value):  # a kernel of the hub
            raise UnsupportedError(code_refused(source, f"{name} {value}"))
        if not isinstance(value, int):
            continue
        most = _MOST_LAYERS if _LAYERS.search(name) else _MOST_SIZE
        if value > most and (_LAYERS.search(name) or _SIZE.search(name)):
            raise UnsupportedError(
                f"the configuration of {source} has {name} {value:,}, over {most:,}, which is the "
                "size of no model; fetch it again, or correct it"
            )
    return raw


def _check_not_quantized(source: str, raw: dict[str, Any]) -> None:
    for part in (raw, *raw.values()):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict):
            how = found.get("quant_method", "8 or 4 bits")
            raise UnsupportedError(
                f"the weights of {source} are quantized ({how}), and what is packed cannot be "
                "pruned; prune the checkpoint that it was made of, and quantize the result"
            )


def _values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a configuration with their keys, those of lists and parts as well."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # One implementation per part of the model stands under the parts' names.
            yield from _values(inner, name if name.endswith(_ATTENTION) else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, name)
    else:
        yield name, value


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
        return code_refused(source, "auto_map in its files")
    return first_line(error)


def code_refused(source: str, what: str) -> str:
    """The sentence for a folder in which `what` needs code that it brings."""
    import transformers

    return (
        f"{source} needs code of its own ({what}), which is never run here; take a version of the "
        f"model that is of a class of transformers (here {transformers.__version__}, a later one "
        "may have it), or, if you trust that code, load the model in Python with "
        "trust_remote_code=True and give it to vlp_plugins.prune"
    )


def meta_model(source: str, adapters: Iterable[Adapter]) -> nn.Module:
    """`unfilled_model` on the meta device."""
    return _made(source, adapters, torch.device("meta"), nullcontext())


def unfilled_model(source: str, adapters: Iterable[Adapter]) -> nn.Module:
    """Makes the model that a folder's `config.json` describes on the CPU, with ties.

    Its weights hold what was in memory until `fill`: nothing is drawn. What the configuration
    alone decides, such as tables of positions, is there. The adapters are those whose families
    transformers may not know.

    Raises:
        UnsupportedError: if the configuration is damaged or of an unknown model.
    """
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]):  # some constructors draw all the same
        model = _made(source, adapters, no_init_weights(), bounded(source))
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()  # left out together with the drawing
    if (Path(source) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        owner: Any = model
        owner.generation_config = GenerationConfig.from_pretrained(source, trust_remote_code=False)
    return model


def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Puts values in place of those that were never set; tied parameters stay one object.

    Raises:
        UnsupportedError: if a value is not a floating number where one trains such.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        if name in parameters:
            if parameters[name].is_floating_point() and not tensor.is_floating_point():
                raise UnsupportedError(
                    f"{name} is {tensor.dtype} in the file, where {type(model).__name__} has "
                    f"{parameters[name].dtype}; copy the folder again"
                )
            parameters[name].data = tensor
        else:
            module, _, buffer = name.rpartition(".")
            model.get_submodule(module)._buffers[buffer] = tensor


def _made(
    source: str,
    adapters: Iterable[Adapter],
    how: AbstractContextManager[object],
    bounds: AbstractContextManager[object],
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
        with bounds, how:
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
