"""Loads a model and its adapter from a path or hub id, its processor, and batches for it."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vlp_plugins.data.batches import CaptionedBatches, open_batches
from vlp_plugins.data.chat import ChatProcessor, chat_processor
from vlp_plugins.data.processors import Processor, load_processor, most_pixels, reads_text
from vlp_plugins.data.sources import checked_source
from vlp_plugins.masks.sparse import is_sparse, sparse_model
from vlp_plugins.methods.resolve import resolve_adapter
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
from vlp_plugins.models.request import checked_arguments
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import stored_tensors
from vlp_plugins.runtime.errors import (
    DataError,
    UnclaimedModelError,
    UnsupportedError,
    VlpError,
    check_hub_id,
    nearest_path,
)
from vlp_plugins.runtime.memory import free_ram, text_of
from vlp_plugins.runtime.model_state import default_device, neutral_state, takes_model
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.structured.files import is_structured, rebuild

_log = logging.getLogger(__name__)

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Number formats of a model by name; `auto` keeps that of its checkpoint."""

MODULE = "module"
"""In place of the name of an adapter: `ModuleAdapter`, which takes any model."""


def load(
    source: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> nn.Module:
    """Loads a model to prune, in evaluation mode, from whatever `vlp prune --model` takes.

    A model of transformers is the one that its own `from_pretrained` loads. The model remembers
    where it came from (`name_or_path`), so that `batches` and `evaluate` find its processor.

    Example:
        model = vlp.load("model-folder")

    Args:
        source: local folder (also one of `vlp masks apply --sparse` or of a model that was cut),
            original checkpoint file of BLIP, X-VLM, CLIP (OpenAI, open_clip), SigLIP (open_clip)
            or ViT (DINO, timm), downloaded folder of open_clip, or hub id.
        adapter: name of the adapter that loads it; None asks all; `module` takes any model.
        dtype: `auto`, the checkpoint's own; `float32`, `bfloat16` or `float16`, or torch's.
        device: `cpu`, `cuda`, ...; None takes a GPU if there is one.

    Raises:
        UnsupportedError: if the source cannot be loaded, it lacks weights that would be pruned, or
            there is no such device.
        UnclaimedModelError: if no adapter claims the model.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UnsupportedError(f"source is a {type(source).__name__}, not a path or hub id")
    name = str(dtype).removeprefix("torch.")
    return load_model(os.fspath(source), adapter=adapter, dtype=name, device=device)[0]


@checked_arguments
@takes_model
def batches(
    data: str | os.PathLike[str],
    model: nn.Module,
    *,
    batch_size: int = 32,
    count: int | None = None,
    seed: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    max_pixels: int | None = None,
    processor: Processor | str | os.PathLike[str] | None = None,
    adapter: Adapter | str | None = None,
    workers: int | None = None,
) -> CaptionedBatches:
    """Calibration batches of captioned images for a model, the same ones as those of `vlp prune`.

    They can be iterated over as often as you like and are the same every time. Nothing is read
    before the first time; images are decoded as they are needed.

    For a chat model each caption answers a prompt, in the model's own chat template, and data of
    conversations or of questions with answers is read as such. `labels` are on the answers.

    Example:
        data = vlp.batches("photos", model, batch_size=32)
        masks = vlp.prune(model, data, method="multiflow", sparsity=0.75)

    Args:
        data: folder of images with `metadata.jsonl` or `.csv` (`file_name` and a caption), COCO or
            Flickr30k, WebDataset tar shards, or anything that `datasets` reads. For a chat model
            also conversations in JSON as LLaVA has them, VQAv2, or columns of these.
        model: that the batches are for. One of images only needs no captions.
        batch_size: pairs of image and caption in a batch.
        count: number of batches; None takes all.
        seed: shuffles the pairs; None keeps the stored order.
        split: of the data; None takes the only one, or `train`.
        image_column: of the images; None finds it.
        caption_column: of the captions; None finds it.
        max_length: most tokens of a caption, longer ones are cut; None asks the tokenizer.
        prompt: of a chat model: what the user says; None: "Describe the image." before captions.
        max_pixels: of a chat model that keeps the size of images: most pixels of one; None: the
            processor's limit, and 401,408 (512 tokens of Qwen2.5-VL) on the CPU.
        processor: the model's, as transformers makes it, or the folder or hub id that has it; None
            looks where the model came from.
        adapter: see `prune`.
        workers: threads that decode images while the model computes; 0 for none; None for the
            cores but one, at most 8. The batches are the same for any number.

    Returns:
        An iterable of dicts of tensors on the CPU. `len` is the number of batches, where the data
        knows how many images it has.

    Raises:
        DataError: if there is no such data, or no processor.
        UnclaimedModelError: if no adapter claims the model.
    """
    adapter = resolve_adapter(model, adapter)
    return open_batches(
        checked_source(data),
        processor_for(
            model, adapter, processor, max_length=max_length, prompt=prompt, max_pixels=max_pixels
        ),
        adapter,
        batch_size,
        limit=count,
        shuffle_seed=seed,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        workers=workers,
        model=model,
    )


class _ImagesOnly:
    """A processor without texts: `ModuleAdapter` passes images and texts to any model."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        return self._processor(images=inputs["images"], return_tensors="pt")


def processor_for(
    model: nn.Module,
    adapter: Adapter,
    processor: Processor | str | os.PathLike[str] | None = None,
    *,
    max_length: int | None = None,
    prompt: str | None = None,
    max_pixels: int | None = None,
) -> Processor:
    """The processor of a model; one of images only for a model that takes no text.

    That of a chat model makes conversations of captions and questions; see `chat_processor`.

    Args:
        model: that it makes batches for.
        adapter: claims the model.
        processor: itself, or where it is: path or hub id; None looks where the model came from.
        max_length: most tokens of a caption; None asks the tokenizer.
        prompt: of a chat model; see `batches`.
        max_pixels: of a chat model; see `batches`.

    Raises:
        DataError: if there is none, or an option is only for chat models.
    """
    if processor is None:
        source = getattr(model, "name_or_path", "")
        if not source:
            raise DataError(
                f"this {type(model).__name__} does not say where it was loaded from, so its "
                "processor cannot be found; pass processor= with the folder or hub id that has "
                "it, or the processor itself"
            )
        processor = load_processor(source, max_length=max_length)
    elif isinstance(processor, (str, os.PathLike)):
        place = str(Path(processor).expanduser()) if "~" in str(processor) else str(processor)
        processor = load_processor(place, max_length=max_length)
    elif max_length is not None:
        raise DataError(
            f"max_length={max_length} does not reach a processor that is given itself; set "
            "processor.tokenizer.model_max_length instead"
        )
    if not reads_text(processor) and _takes_no_text(model, adapter):
        return _ImagesOnly(processor)
    return _for_chat(model, adapter, processor, prompt, max_pixels)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


_CPU_PIXELS = 512 * 28 * 28


def _for_chat(
    model: nn.Module,
    adapter: Adapter,
    processor: Processor,
    prompt: str | None,
    max_pixels: int | None,
) -> Processor:
    """The processor with prompt and limit, which only one of a chat model takes."""
    own = most_pixels(getattr(processor, "image_processor", None))
    too_large = max_pixels is None and own is not None and own > _CPU_PIXELS
    if too_large and device_of(model).type == "cpu":
        max_pixels = _CPU_PIXELS
        _log.warning(
            "images are made no larger than %s pixels on a CPU, where the processor allows "
            "%s; max_pixels (--max-pixels) changes that",
            f"{max_pixels:,}", f"{own:,}",
        )  # fmt: skip
    can: Any = getattr(model, "can_generate", None)
    continues = adapter.general and callable(can) and can() and not _is_encoder_decoder(model)
    made = chat_processor(processor, prompt=prompt, max_pixels=max_pixels, continues=continues)
    if not isinstance(made, ChatProcessor) and prompt is not None:
        raise DataError(
            f"prompt (--prompt) is for chat models, and the processor of this "
            f"{type(model).__name__} has no chat template; leave it out"
        )
    if max_pixels is not None and own is None:
        raise DataError(
            f"max_pixels (--max-pixels) is for processors that keep the size of images; that of "
            f"this {type(model).__name__} makes all images of one size: leave it out"
        )
    return made


def _takes_no_text(model: nn.Module, adapter: Adapter) -> bool:
    """True for a model without an input of words, of an adapter that takes models of any kind."""
    if not isinstance(adapter, ModuleAdapter) and not adapter.general:
        return False
    return "input_ids" not in inspect.signature(model.forward).parameters


@neutral_state()
def load_model(
    source: str,
    *,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[nn.Module, Adapter]:
    """Loads a model in evaluation mode and finds its adapter.

    A folder of `save_structured` records its model and adapter. For any other source every adapter
    is first asked whether it knows the format (original checkpoints, models that transformers does
    not have); then transformers loads the class that the configuration names.

    Args:
        source: local folder, checkpoint file, or hub id.
        adapter: name of the adapter; None asks all; `module` describes any model by its layers.
        dtype: `auto`, the checkpoint's own; `float32`, `bfloat16` or `float16`.
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
        return _named(model, source).to(device=target, dtype=DTYPES[dtype]), chosen
    if is_sparse(source):
        model = sparse_model(source)
    else:
        found = (_load_by(known.adapter, name, source) for name in _names(known, adapter))
        first = next((model for model in found if model is not None), None)
        if first is None:
            first, missing = _from_transformers(source, DTYPES[dtype] or "auto")
        model = first
    chosen = _adapter_of(model, known, adapter)
    _report_missing(source, model, chosen, missing)
    return _named(model, source).to(device=target, dtype=DTYPES[dtype]).eval(), chosen


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


def describe_file(source: str) -> str | None:
    """What a checkpoint of an original code base is; None if no adapter knows its format.

    Args:
        source: as of `load_model`.

    Raises:
        UnsupportedError: if the file is damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return None
    known = registry()
    adapters = (known.adapter(name) for name in known.adapter_names())
    return next(filter(None, (adapter.describe(str(path)) for adapter in adapters)), None)


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
        with bounded(source, values=False):
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
    check_hub_id(source, "model", UnsupportedError)  # the hub would take long to refuse a path
    return source, known


def _named(model: nn.Module, source: str) -> nn.Module:
    """The model, which says where it came from as `from_pretrained` has it."""
    model.name_or_path = source  # type: ignore[assignment]
    return model


def _names(known: Registry, adapter: str | None) -> Iterable[str]:
    return known.adapter_names() if adapter in (None, MODULE) else [str(adapter)]


def _load_by(find: Callable[[str], Adapter], name: str, source: str) -> nn.Module | None:
    """What one adapter loads; one that breaks does not stop the others."""
    try:
        return find(name).load(source)
    except (VlpError, MemoryError):
        raise  # it knows the format and says what is wrong
    except KeyboardInterrupt:
        raise
    except BaseException as error:
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
            f"{error}, or take all its layers with adapter={MODULE!r} (--adapter {MODULE})"
        ) from error


def _from_transformers(source: str, dtype: torch.dtype | str) -> tuple[nn.Module, list[str]]:
    """The model, and the parameters that the checkpoint lacks."""
    import transformers

    path = Path(source)
    if path.is_file() and (path.parent / "config.json").is_file():
        raise UnsupportedError(f"{source} is only part of a model; give the folder that it is in")
    if path.is_file():
        raise UnsupportedError(
            f"{source} is a checkpoint file that no adapter recognises; give a folder with "
            "config.json, or a checkpoint of the original code of BLIP, X-VLM, CLIP, open_clip, "
            "DINO or timm"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UnsupportedError(f"folder {source} has no config.json; give the model's own folder")
    try:
        loader = transformers_class(load_config(source)) or transformers.AutoModel
        with bounded(source):
            _check_memory(path, dtype)
            model, report = loader.from_pretrained(
                source, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except (VlpError, MemoryError):
        raise
    except Exception as error:  # damaged files raise what their parsers raise
        near = nearest_path(path)
        nowhere = (
            "" if path.exists() else f"there is no such file or folder{near}, and as a hub id: "
        )
        raise UnsupportedError(
            f"cannot load a model from {source!r}: {nowhere}{loading_failure(source, error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{source!r} holds {type(model).__name__}, which is no torch module")
    return model, sorted(report["missing_keys"])


def _check_memory(folder: Path, dtype: torch.dtype | str) -> None:
    """Raises `UnsupportedError` if a number format makes values that do not fit into the memory.

    In the format of its files a model is views of these, mapped, which take no memory of their own
    until they are written. On Windows transformers reads them.
    """
    if isinstance(dtype, str) or not folder.is_dir():
        return
    taken = 0
    for path in folder.glob("*.safetensors"):
        for stored, size in stored_tensors(path).values():
            if stored.is_floating_point and (stored != dtype or sys.platform == "win32"):
                taken += size // stored.itemsize * dtype.itemsize
    if taken > (free := free_ram()):
        raise UnsupportedError(
            f"{folder} in {str(dtype).removeprefix('torch.')} takes {text_of(taken)}, and "
            f"{text_of(free)} of memory are free; load it in the number format of its files (leave "
            "--dtype out, in Python dtype), in which values are read from them when needed"
        )


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
