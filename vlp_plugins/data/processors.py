"""The processor of a model: images and captions -> tensors, with Pillow and never torchvision."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from vlp_plugins.models.architecture import code_refused, load_config, loading_failure
from vlp_plugins.runtime.errors import DataError, check_hub_id, first_line, shown
from vlp_plugins.runtime.untrusted import check_read

_IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = "tokenizer_config.json"
_FILES = (
    f"tokenizer.json (or vocab.txt) with tokenizer_config.json, and {' or '.join(_IMAGE_FILES)}"
)
_REASON = 160  # characters of what transformers says
_PIXEL_BYTES = 3 * 4  # RGB in float32


class Processor(Protocol):
    """What `Adapter.collate` calls: the signature of a transformers processor."""

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Takes `images`, `text`, `padding`, `truncation`, `return_tensors`; returns tensors."""


class CombinedProcessor:
    """A tokenizer, or None, and an image processor that were saved in one folder."""

    def __init__(self, tokenizer: Any | None, image_processor: Any, source: str) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._source = source

    def __call__(
        self,
        *,
        images: Any = None,
        text: Any = None,
        return_tensors: str | None = None,
        **text_options: Any,
    ) -> dict[str, Any]:
        """Makes `pixel_values` of `B` images, `input_ids` and `attention_mask` of `B` texts.

        Raises:
            DataError: if there is text and no tokenizer, or the settings in its files fail.
        """
        batch: dict[str, Any] = {}
        if images is not None:
            made = self._made_by(self.image_processor, images=images, return_tensors=return_tensors)
            batch.update(made)
        if text is not None:
            if self.tokenizer is None:
                raise DataError(
                    f"{self._source} has an image processor and no tokenizer, but the model reads "
                    "text; put tokenizer.json (or vocab.txt) and tokenizer_config.json there, or "
                    "name a folder or hub id that has them with --processor (in Python: processor=)"
                )
            made = self._made_by(
                self.tokenizer, text=text, return_tensors=return_tensors, **text_options
            )
            batch.update(made)
        return batch

    def _made_by(self, part: Any, **inputs: Any) -> Mapping[str, Any]:
        try:
            made: Mapping[str, Any] = part(**inputs)
        except MemoryError:
            raise
        except Exception as error:  # settings of files raise where they are first used
            raise DataError(
                f"the {type(part).__name__} at {self._source} fails ({type(error).__name__}: "
                f"{first_line(error)}); copy the files of the processor again"
            ) from error
        return made


def load_processor(source: str, *, max_length: int | None = None) -> Processor:
    """Loads the processor of a model.

    First the family's own processor; where the files do not name one, tokenizer and image
    processor on their own. Models of images only get the image processor alone.

    Args:
        source: the model's folder, a checkpoint file in it, or a hub id.
        max_length: most tokens of a caption, longer ones are cut; None takes the tokenizer's
            limit, or the number of positions that the model's configuration states.

    Raises:
        DataError: if there is no image processor.
    """
    path = Path(source)
    folder = str(path.parent) if path.is_file() else source
    where = f"next to {source}" if path.is_file() else f"at {source}"
    check_hub_id(folder, "processor", DataError)
    with _quiet():
        processor, reasons = _load(folder)
    if processor is None:
        place, why = Path(folder), "; ".join(reasons)
        if "trust_remote_code" not in why:  # else it is a sentence of ours
            why = shorten(why, _REASON, placeholder=" ...")
        if place.is_dir() and not any((place / name).exists() for name in _IMAGE_FILES):
            why = ""  # it was said what is missing
        raise DataError(
            f"no processor {where}: it needs {_FILES}; copy them from the model that it was made "
            "of, or name a folder or hub id that has them with --processor (in Python: processor=)"
            f"{why and f' ({why})'}"
        )
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.model_max_length = _length_limit(folder, tokenizer, max_length)
    return processor


def reads_text(processor: Processor) -> bool:
    """False if the processor is of a model of images only."""
    return getattr(processor, "tokenizer", None) is not None


def _load(folder: str) -> tuple[Processor | None, list[str]]:
    import transformers

    reasons: list[str] = []

    def attempt(find: Callable[[], Any], **options: Any) -> Any:
        try:
            kind = find()  # a class of transformers, or None
            # The default, None, would ask on the terminal whether code may run.
            return kind and kind.from_pretrained(folder, trust_remote_code=False, **options)
        except Exception as error:  # damaged files raise what their parsers raise
            reasons.append(loading_failure(folder, error))
            return None

    _check_tokenizer(folder)
    whole = attempt(lambda: transformers.AutoProcessor, backend="pil")
    if whole is None:
        whole = attempt(lambda: _without_video(folder), backend="pil")
    if getattr(whole, "image_processor", None):
        _check_sizes(whole.image_processor, folder)
        if _has_words(getattr(whole, "tokenizer", None)):
            return whole, reasons
    images = attempt(lambda: transformers.AutoImageProcessor, backend="pil")
    if images is None:
        return None, reasons[-1:]
    _check_sizes(images, folder)
    tokenizer = attempt(lambda: transformers.AutoTokenizer)
    if getattr(tokenizer, "chat_template", None):  # only its own knows the tokens of an image
        why = next((reason for reason in reasons if "pil backend" not in reason), reasons[0])
        raise DataError(f"the processor of the chat model at {folder} cannot be made: {why}")
    return CombinedProcessor(tokenizer if _has_words(tokenizer) else None, images, folder), reasons


def _without_video(folder: str) -> Any | None:
    """The class of the folder's processor without its part for videos, which needs torchvision.

    None if it has no such part.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    names = (_named_in(folder, file).get("processor_class") for file in (*_IMAGE_FILES, _TOKENIZER))
    name = next(filter(None, names), None)
    kind: Any = (
        PROCESSOR_MAPPING[type(load_config(folder))]
        if name is None
        else getattr(transformers, str(name))
    )
    parts = kind.get_attributes()
    kept = [part for part in parts if "video" not in part]
    if kept == parts:
        return None

    def get_attributes(_: Any) -> list[str]:
        return kept

    def arguments(cls: Any, *values: Any, **options: Any) -> list[Any]:
        found = super(own, cls)._get_arguments_from_pretrained(*values, **options)
        by_name = dict(zip(kept, found, strict=True))
        return [by_name.get(part) for part in parts]

    own: Any = type(
        kind.__name__,
        (kind,),
        {
            "__module__": kind.__module__,
            "get_attributes": classmethod(get_attributes),
            "_get_arguments_from_pretrained": classmethod(arguments),
        },
    )
    return own


def _named_in(folder: str, name: str) -> dict[str, Any]:
    """What a JSON file of a folder or hub id says; nothing if it is not there, or damaged."""
    from transformers.utils import cached_file

    try:
        file = cached_file(
            folder,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        found = json.loads(Path(file).read_bytes()) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_tokenizer(folder: str) -> None:
    """Raises `DataError` if only code of the folder has its class: another would be taken."""
    import transformers

    named = _named_in(folder, _TOKENIZER)
    name = named.get("tokenizer_class")
    if isinstance(name, str) and "auto_map" in named and not hasattr(transformers, name):
        raise DataError(code_refused(folder, f"the tokenizer {name}"))


def _check_sizes(images: Any, folder: str) -> None:
    """Raises `DataError` if it makes images of more than `read_limit`."""
    if most := most_pixels(images):  # its size counts pixels
        check_read(f"{folder}: an image of {most:,} pixels", most * _PIXEL_BYTES, DataError)
        return
    for name in ("size", "crop_size", "pad_size"):
        size = getattr(images, name, None)
        try:
            if isinstance(size, int) or not size:
                sides = [int(size or 0)] * 2
            else:
                edge = size.get("shortest_edge") or 0
                sides = [int(size.get(side) or edge) for side in ("height", "width")]
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{folder}: {name} of images is {shown(size)}; copy the processor's files again"
            ) from error
        what = f"{folder}: an image of {name} {sides[0]} x {sides[1]}"
        check_read(what, sides[0] * sides[1] * _PIXEL_BYTES, DataError)


def most_pixels(images: Any) -> int | None:
    """The pixels that an image processor scales large images down to; None for a fixed size."""
    known = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    size = getattr(images, "size", None)
    most = size.get("longest_edge") if "max_pixels" in known and size else None
    return None if most is None else int(most)


def _has_words(tokenizer: Any) -> bool:
    """False for the empty tokenizer that transformers makes where the vocabulary is missing."""
    return tokenizer is not None and len(tokenizer) > len(set(tokenizer.all_special_ids))


def _length_limit(folder: str, tokenizer: Any, asked: int | None) -> int:
    if asked is not None and asked < 3:
        raise DataError(f"max_length must leave room for a word, at least 3, not {asked}")
    limits = [limit for limit in (asked, _positions(folder)) if limit is not None]
    own = tokenizer.model_max_length
    if not isinstance(own, int | float):
        raise DataError(
            f"tokenizer_config.json of {folder}: model_max_length is {shown(own)}, not a number"
        )
    return min([int(own), *limits])


def _positions(folder: str) -> int | None:
    """Text positions in the model's configuration; None if it does not say."""
    import transformers

    try:
        with _quiet():
            config = load_config(folder).to_dict()
    except Exception:  # a configuration that only an adapter knows
        try:
            config, _ = transformers.PreTrainedConfig.get_config_dict(folder)
        except Exception:  # none at all: an original checkpoint
            return None
    places = (config, config.get("text_config"), config.get("text"))
    found = [p["max_position_embeddings"] for p in places
             if isinstance(p, dict) and "max_position_embeddings" in p]  # fmt: skip
    return min(found, default=None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to install torchvision, which breaks transformers with CPU torch."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
