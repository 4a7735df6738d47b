"""Which kind each token is, from what the sub-models of a forward are really called with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vlp_adapters.transformers.towers import (
    AUDIO,
    FUSION,
    VISION,
    Towers,
    is_pretrained,
    sub_configs,
)
from vlp_plugins.calibration.batches import batch_size
from vlp_plugins.models.adapter import Batch, Owner, Places, TokenKind
from vlp_plugins.runtime.errors import BatchError
from vlp_plugins.runtime.offload import device_of

_KIND = {VISION: TokenKind.IMAGE, AUDIO: TokenKind.AUDIO}
_PLACEHOLDER = re.compile(r"^(image|video|audio)_token_(id|index)$")
_MASKS = ("attention_mask", "patch_attention_mask", "pixel_attention_mask")
_SEQUENCES = ("inputs_embeds", "input_ids")
_OTHERS = (
    "encoder_hidden_states", "cross_attention_states", "key_value_states",
    "cross_modal_hidden_states", "text_encoder_hidden_states",
)  # fmt: skip
_VISUAL = (TokenKind.IMAGE, TokenKind.VIDEO)
_OTHER_MASKS = (
    "encoder_attention_mask", "cross_attention_mask", "text_encoder_attention_mask",
)  # fmt: skip
_REGIONS = ("vision_features", "vision_encoder_hidden_states")  # with a text next to them
_OBSERVING: ContextVar[Sequences | None] = ContextVar("observing", default=None)
_QUERIES = "query_embeds"
VIDEOS = re.compile(r"pixel_values_videos$|video_pixel_values$")
"""Inputs that are videos."""
_GRIDS = {
    TokenKind.IMAGE: ("image_grid_thw", "spatial_shapes"),
    TokenKind.VIDEO: ("video_grid_thw",),
}
_READS_VIDEOS = "get_video_features"
_READERS = ("get_image_features", _READS_VIDEOS)
_NOTED: dict[tuple[nn.Module, str], tuple[int, Any]] = {}
"""Methods that note their calls: for how many forwards, and the attribute of the module before."""
_RESIDUAL = "input_tensor"  # what BERT's layers add to their input, and a part of the same sequence


@dataclass(frozen=True, slots=True)
class _Call:
    """A running call of a module.

    Attributes:
        kinds: uint8 `[batch, tokens]` of its own sequence; None where the call says nothing.
        queries: how many tokens at the front are queries.
        other: the sequence that it attends to.
        other_kinds: uint8 `[batch, tokens]` of that; None: no padding.
        closed: the module reads nothing that its caller's mask is for.
    """

    module: nn.Module
    kinds: Tensor | None = None
    queries: int = 0
    other: Tensor | None = None
    other_kinds: Tensor | None = None
    closed: bool = False


class Sequences:
    """The sequences of one forward: what is asked for the kinds of a module's input."""

    def __init__(self, towers: Towers, batch: Batch) -> None:
        self._towers = towers
        self._batch = batch
        self._text = text = kinds_of_text(towers.model.config, batch)
        self._visual = {k for k in _VISUAL if text is not None and bool((text == k).any())}
        self._calls: list[_Call] = []
        self._known: dict[tuple[object, ...], tuple[Tensor, Tensor | None]] = {}
        self._derived: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._regions: dict[torch.Size, Tensor] = {}
        self._spots: dict[TokenKind, tuple[list[int], list[int]]] = {}
        self._read: dict[tuple[str, TokenKind], dict[int, int]] = {}
        self._reads_videos = 0

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Hooks on every module that is called with a mask, and on every tower."""
        model = self._towers.model
        decoders = _decoders(model)
        with ExitStack() as stack:
            token = _OBSERVING.set(self)
            stack.callback(_OBSERVING.reset, token)
            stack.callback(self._calls.clear)
            stack.callback(self._known.clear)
            stack.callback(self._derived.clear)
            stack.callback(self._regions.clear)
            stack.callback(self._read.clear)
            for path, module in model.named_modules():
                kind: Any = type(module)
                for reader in _READERS if len(self._visual) > 1 else ():
                    if hasattr(module, reader):
                        stack.enter_context(_noted(module, reader))
                names = _arguments(kind)
                told = {*_MASKS, *_OTHERS, *_REGIONS, _RESIDUAL}
                if is_pretrained(module) or not told.isdisjoint(names):
                    enter = self._enter(path, names, module in decoders)
                    before = module.register_forward_pre_hook(enter, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def kinds(self, owner: Owner, inputs: Tensor) -> Tensor | TokenKind:
        """See `vlp_plugins.models.adapter.Kinds`."""
        plain = self._plain(owner.tokens)
        regions = self._regions.get(inputs.shape[:-1])
        if regions is not None and owner.tokens in (FUSION, VISION):
            return regions
        nearest: Tensor | None = None
        is_other = joins_text = False
        for call in reversed(self._calls):
            if call.other is not None:
                if _same(inputs, call.other):
                    if call.other_kinds is not None:
                        return call.other_kinds
                    is_other = True
                joins_text = joins_text or call.other_kinds is self._text
            kinds = call.kinds
            # An image reads no mask of the text around it, unless it is called with one.
            if kinds is not None and (kinds is not self._text or owner.tokens not in _KIND):
                if joins_text and kinds is self._text:
                    return self._seen
                fused = owner.view is not None
                if not is_other and (fit := self._fit(call, kinds, inputs, fused)) is not None:
                    return fit
                nearest = kinds if nearest is None else nearest
            if call.closed:
                break
        if is_other:
            images = owner.tokens not in _KIND and "image" in self._towers.inputs
            return self._seen if images else TokenKind.TEXT
        if nearest is None or inputs.ndim < 3 or owner.tokens in _KIND:
            return plain
        if bool((nearest == TokenKind.PADDING).any()):
            return nearest  # does not fit, which the caller says
        if inputs.ndim == 3 and len(inputs) == len(nearest) and nearest is self._text:
            # Without padding there is no mask, and words and images may be in one sequence.
            lead = inputs.shape[:-1]
            return self._derive(nearest, ("all", *lead), lambda: self._beside_text(lead))
        return plain

    def samples(self, owner: Owner, lead: torch.Size, call: int) -> Places | None:
        """See `vlp_plugins.models.adapter.Stream.samples`.

        Raises:
            BatchError: if that cannot be told.
        """
        size = batch_size(self._batch)
        device = device_of(self._towers.model)
        if len(lead) == 2 and lead[1] == size and self._is_sequence_first(owner):
            return Places(torch.arange(size, device=device).expand(lead))
        kind = self._plain(owner.tokens)
        found, lengths = self._placed(kind) if owner.tokens in _KIND else ([], [])
        counts = None
        whole = True
        if not found:
            if lead[0] == size:
                return None
            found = list(range(size))
            counts = self._divided(lead.numel(), [1] * size)
        else:
            whole = kind not in self._visual or len(self._visual) < 2
            if whole and lead[0] == size and found == list(range(size)):
                return None
            for rows in ([1] * len(found), *self._tiled(kind)):
                if counts is None and len(rows) == len(found) and sum(rows) == lead[0]:
                    counts = [count * (lead.numel() // lead[0]) for count in rows]
            in_a_row = len(lead) == 1 or lead[0] == 1
            if counts is None and in_a_row and lead.numel() < sum(lengths):
                return self._next(owner.module, call, lead, kind)
            counts = counts or self._divided(lead.numel(), lengths)
        if counts is None:
            raise BatchError(
                f"the output of {owner.module} is {[*lead, '...']}, and which sample each of these "
                f"positions belongs to cannot be told ({len(found)} images, {size} samples); "
                "exclude the layer (TransformersAdapter(exclude=...))"
            )
        of = torch.tensor(found, device=device)
        of = of.repeat_interleave(torch.tensor(counts, device=device)).reshape(lead)
        return Places(of, whole)

    def _next(self, module: str, call: int, lead: torch.Size, kind: TokenKind) -> Places:
        """The samples of one of several calls, image by image.

        The language model reads a token for each placeholder: these are the next of them.
        """
        assert self._text is not None
        of = (self._text == kind).nonzero()[:, 0]
        read = self._read.setdefault((module, kind), {})
        start = max((stop for other, stop in read.items() if other < call), default=0)
        read[call] = start + lead.numel()
        if read[call] > len(of):
            raise self._misread(module, read[call], len(of))
        return Places(of[start : read[call]].reshape(lead), whole=False)

    def check_read(self) -> None:
        """Raises `BatchError` if a module that reads image by image did not read all of them."""
        for (module, kind), read in self._read.items():
            total = sum(self._placed(kind)[1])
            if max(read.values()) != total:
                raise self._misread(module, max(read.values()), total)

    def _misread(self, module: str, read: int, total: int) -> BatchError:
        return BatchError(
            f"the outputs of {module} are {read} tokens of images in several calls, but the batch "
            f"has {total} placeholders of images, so that the sample of each cannot be told; "
            "exclude the layer (TransformersAdapter(exclude=...))"
        )

    def _plain(self, space: str) -> TokenKind:
        """The kind of the tokens of a space, where no mask says more."""
        kind = _KIND.get(space, TokenKind.TEXT)
        return self._seen if kind is TokenKind.IMAGE else kind

    @property
    def _seen(self) -> TokenKind:
        """What the vision layers that run now read: images or videos."""
        if len(self._visual) < 2:
            return next(iter(self._visual), TokenKind.IMAGE)
        # Models read them one after the other, with the same layers.
        return TokenKind.VIDEO if self._reads_videos else TokenKind.IMAGE

    @contextmanager
    def reading(self, reader: str, given: tuple[Any, ...]) -> Iterator[None]:
        """Notes which a method of the model reads while it runs, images or videos.

        Args:
            reader: name of the method; that for images may be called with videos.
            given: what it is called with.
        """
        videos = [self._batch[name] for name in self._batch if VIDEOS.match(name)]
        is_video = any(value is video for value in given for video in videos if video is not None)
        noted = reader == _READS_VIDEOS or is_video
        self._reads_videos += noted
        try:
            yield
        finally:
            self._reads_videos -= noted

    def _placed(self, kind: TokenKind) -> tuple[list[int], list[int]]:
        """Of each image or video the sample that it stands in, and its number of placeholders.

        Where the batch has no grid of patches for each, those that follow each other without a word
        between them count as one.
        """
        if self._text is None:
            return [], []
        if kind not in self._spots:
            self._spots[kind] = self._on_grids(kind) or _runs(self._text == kind)
        return self._spots[kind]

    def _on_grids(self, kind: TokenKind) -> tuple[list[int], list[int]] | None:
        """`_placed` by the grids of patches, of which each placeholder stands for as many."""
        known = (self._batch.get(name) for name in _GRIDS.get(kind, ()))
        grids = next((grid for grid in known if grid is not None), None)
        if self._text is None or not isinstance(grids, Tensor) or grids.ndim != 2:
            return None
        samples = (self._text == kind).nonzero()[:, 0].tolist()
        sizes = self._divided(len(samples), grids.prod(1).tolist()) if samples else None
        if sizes is None or 0 in sizes:
            return None
        stops = [*accumulate(sizes)]
        first = [samples[stop - size] for stop, size in zip(stops, sizes, strict=True)]
        fits = first == [samples[stop - 1] for stop in stops]
        return (first, sizes) if fits else None

    def _tiled(self, kind: TokenKind) -> Iterator[list[int]]:
        """How many tiles each image has, or frames a video: those that are filled, and all."""
        names = [name for name in self._batch if "pixel_values" in name]
        videos = [name for name in names if VIDEOS.match(name)]
        images = [name for name in names if name not in videos]
        for name in videos or images if kind is TokenKind.VIDEO else images:
            pixels = self._batch[name]
            if isinstance(pixels, Tensor) and pixels.ndim == 5:
                yield pixels.flatten(2).any(2).sum(1).tolist()
                yield [pixels.shape[1]] * len(pixels)

    def _divided(self, total: int, shares: list[int]) -> list[int] | None:
        """A number of tokens divided in proportion; None if that leaves fractions."""
        whole = sum(shares)
        if not whole or any(total * share % whole for share in shares):
            return None
        return [total * share // whole for share in shares]

    def _is_sequence_first(self, owner: Owner) -> bool:
        """Whether a module is in a tower of torch's attention with `[tokens, batch, ...]`."""
        path = owner.module.removeprefix(self._towers.prefix)
        tower = self._towers.model.get_submodule(self._towers.root_of(path) or "")
        return any(
            isinstance(module, nn.MultiheadAttention) and not module.batch_first
            for module in tower.modules()
        )

    def _fit(
        self, call: _Call, kinds: Tensor, inputs: Tensor, fused: bool = False
    ) -> Tensor | TokenKind | None:
        """The kinds of an input that is the sequence, a part of it, or its tokens in one row.

        Args:
            call: that the kinds are of.
            kinds: uint8 `[batch, tokens]`.
            inputs: of a module inside the call.
            fused: whether the module may read every token once for each expert.
        """
        lead = inputs.shape[:-1]
        size, length = kinds.shape
        if lead == kinds.shape:
            return kinds
        if size == 1 < len(inputs) and lead[1:] == kinds.shape[1:]:  # one mask for all samples
            return self._derive(kinds, ("all", *lead), lambda: kinds.expand(lead))
        if inputs.ndim == 2 and len(inputs) == size:
            return TokenKind.TEXT  # one vector per sample
        if lead.numel() == kinds.numel() and (len(lead) == 1 or lead[0] == size):
            return self._derive(kinds, ("all", *lead), lambda: kinds.reshape(lead))
        if fused and inputs.ndim == 2 and len(inputs) % kinds.numel() == 0:
            copies = len(inputs) // kinds.numel()  # one for each expert
            return self._derive(kinds, ("all", *lead), lambda: kinds.flatten().repeat(copies))
        if inputs.ndim != 3 or lead[0] != size or not 0 < lead[1] < length:
            return None
        start = _start(inputs, length)
        if start is None and call.queries:
            start = 0 if lead[1] == call.queries else call.queries
        if start is None or start + lead[1] > length:
            return None
        stop = start + lead[1]
        return self._derive(kinds, ("part", start, stop), lambda: kinds[:, start:stop])

    def _derive(self, kinds: Tensor, how: tuple[object, ...], make: Any) -> Tensor:
        """The same tensor for the same question: what is measured goes by the identity of masks."""
        key = (id(kinds), *how)
        if key not in self._derived:
            self._derived[key] = (kinds, make())
        return self._derived[key][1]

    def _enter(self, path: str, names: tuple[str, ...], decoder: bool) -> Any:
        """The hook that notes what a module is called with."""
        towers = self._towers
        space = towers.reads(path)
        closed = not path or path in towers.roots
        pretrained = is_pretrained(towers.model.get_submodule(path))
        has_other_mask = any(name in names for name in _OTHER_MASKS)
        # What an encoder-decoder attends to is its text with images; what others do, images.
        written = space in _KIND or towers.model.config.is_encoder_decoder
        other_default = TokenKind.TEXT if written else TokenKind.IMAGE

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _OBSERVING.get() is not self:
                return  # another forward of the same model, while this one waits
            values = (*zip(names, args, strict=False), *kwargs.items())
            given = {name: value for name, value in values if isinstance(value, Tensor)}
            length = next((value for name, value in values if name == "query_length"), None)
            other = next((v for n in _OTHERS if (v := given.get(n)) is not None), None)
            regions = next((given[n] for n in _REGIONS if n in given), None)
            if regions is not None and regions.shape[:-1] not in self._regions:
                self._note_regions(regions.shape[:-1], given)
            masks = [(n, given[n]) for n in _MASKS if n in given]
            other_masks = [(n, given[n]) for n in _OTHER_MASKS if n in given]
            if other is not None and not has_other_mask:  # cross-attention itself
                masks, other_masks = [], masks
            if length is None:
                length = given[_QUERIES].shape[1] if _QUERIES in given else 0
            queries = int(length)
            around = None if space in _KIND else self._around()
            default = self._plain(space)
            kinds = other_kinds = None
            for name, mask in masks:
                if kinds is None:
                    kinds = self._of_mask(name, mask, default, queries, around)
            sequence = next((given[n] for n in _SEQUENCES if n in given), None)
            ended = closed
            if kinds is None and decoder:
                kinds, ended = self._of_labels(), True
                if regions is not None and kinds is None and sequence is not None:
                    kinds = sequence.new_full(
                        sequence.shape[:2], int(TokenKind.QUERY), dtype=torch.uint8
                    )
            elif kinds is None and pretrained and queries:
                shape = given[_QUERIES].shape[:2]
                device = given[_QUERIES].device
                kinds = torch.full(shape, int(TokenKind.QUERY), dtype=torch.uint8, device=device)
            elif kinds is None and pretrained and sequence is not None:
                if around is not None and sequence.shape[:2] == around.shape:
                    kinds = around
                else:
                    ended = True
            if kinds is None and (residual := given.get(_RESIDUAL)) is not None:
                queried = (c for c in reversed(self._calls) if c.queries and c.kinds is not None)
                if (call := next(queried, None)) is not None and call.kinds is not None:
                    fit = self._fit(call, call.kinds, residual)
                    kinds = fit if isinstance(fit, Tensor) else None
            if other is not None:
                known = (c for c in reversed(self._calls) if c.other is other)
                other_kinds = next((c.other_kinds for c in known), None)
                for name, mask in other_masks:
                    if other_kinds is None:
                        beside = around if other_default is TokenKind.TEXT else None
                        found = self._of_mask(name, mask, other_default, 0, beside)
                        fits = found is not None and found.shape == other.shape[:2]
                        other_kinds = found if fits else None
                if (tiles := self._tiles(other)) is not None:
                    other_kinds = tiles
            self._calls.append(_Call(module, kinds, queries, other, other_kinds, ended))

        return enter

    def _around(self) -> Tensor | None:
        """The kinds of the sequence that the running calls are about; at first the text."""
        for call in reversed(self._calls):
            if call.kinds is not None:
                return call.kinds
            if call.closed:
                return None
        return self._text

    def _note_regions(self, lead: torch.Size, given: Mapping[str, Tensor]) -> None:
        """Keeps the kinds of the regions of images, which a detector reads in turn with the text.

        Where the mask of the text is true at the padding, that of the regions is, too.
        """
        mask, words = (given.get(f"{of}_attention_mask") for of in ("vision", "text"))
        if mask is None or mask.shape != lead:
            device = device_of(self._towers.model)
            mask, words = torch.ones(lead, dtype=torch.bool, device=device), None
        real = ~(mask != 0) if words is not None and self._is_inverted(words != 0) else mask != 0
        self._regions[lead] = real.to(torch.uint8) * TokenKind.IMAGE

    def _is_inverted(self, real: Tensor) -> bool:
        """Whether a mask is true exactly where the text is padding."""
        text = self._text
        return (
            text is not None
            and real.shape == text.shape
            and torch.equal(real.to(text.device), text == TokenKind.PADDING)
        )

    def _tiles(self, other: Tensor) -> Tensor | None:
        """The kinds of images in tiles, of which some are empty, that all texts attend to."""
        mask = self._batch.get("cross_attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4:  # [batch, tokens, images, tiles]
            return None
        tiles = (mask != 0).any(1).flatten()
        lead = other.shape[:-1]
        if lead.numel() % len(tiles):
            return None
        key = (id(mask), "tiles", *lead)
        if key not in self._known:
            real = tiles.repeat_interleave(lead.numel() // len(tiles)).reshape(lead)
            self._known[key] = (mask, real.to(torch.uint8) * TokenKind.IMAGE)
        return self._known[key][1]

    def _leave(self, module: nn.Module, *_: Any) -> None:
        while _OBSERVING.get() is self and self._calls and self._calls.pop().module is not module:
            pass

    def _of_mask(
        self, name: str, mask: Tensor, default: TokenKind, queries: int, around: Tensor | None
    ) -> Tensor | None:
        """The kinds of a sequence that a module is called with a mask of; the same ones again."""
        key = (id(mask), name, default, queries, id(around))
        if key not in self._known:
            # Parts of a model may be on different devices.
            real = _real(name, mask if around is None else mask.to(around.device), around)
            if real is not None and self._is_inverted(real):
                real = ~real
            kinds = None if real is None else self._kinds_where(real, default, queries, around)
            self._known[key] = (mask, kinds)
        return self._known[key][1]

    def _kinds_where(
        self, real: Tensor, default: TokenKind, queries: int, around: Tensor | None
    ) -> Tensor:
        if around is not None and around.shape == real.shape:
            known = around != TokenKind.PADDING
            return around if torch.equal(real, known) else around * real
        if queries:
            kinds = real.to(torch.uint8) * TokenKind.TEXT
            kinds[:, :queries] = real[:, :queries].to(torch.uint8) * TokenKind.QUERY
            return kinds
        text = self._text
        extra = 0 if text is None else real.shape[1] - text.shape[1]
        if text is None or around is not text or len(text) != len(real) or extra <= 0:
            return real.to(torch.uint8) * default
        return self._beside_text(real.shape, real)

    def _beside_text(self, lead: torch.Size, real: Tensor | None = None) -> Tensor:
        """The kinds of words and images in one sequence `[batch, tokens]`, images not among words.

        Args:
            lead: shape of the sequence, longer than the text.
            real: bool, where it is no padding; None: everywhere.
        """
        text = self._text
        assert text is not None
        extra = lead[1] - text.shape[1]
        kinds = text.new_full(lead, int(TokenKind.IMAGE))
        first = self._text_comes_first
        if real is not None:
            words = text != TokenKind.PADDING
            first = torch.equal(real[:, :-extra], words) and (
                first or not torch.equal(real[:, extra:], words)
            )
        if extra > 0:
            kinds[:, slice(0, -extra) if first else slice(extra, None)] = text
        return kinds if real is None else kinds * real

    @property
    def _text_comes_first(self) -> bool:
        """Whether words stand in front of patches, where masks cannot tell."""
        return self._towers.model.config.model_type == "vilt"

    def _of_labels(self) -> Tensor | None:
        """The kinds of what a decoder writes: text where there is something to predict."""
        mask = self._batch.get("decoder_attention_mask")
        if mask is None:
            labels = self._batch.get("labels")
            if labels is None or labels.ndim != 2:
                return None
            mask = labels >= 0
        return (mask != 0).to(torch.uint8) * TokenKind.TEXT


@contextmanager
def _noted(module: nn.Module, reader: str) -> Iterator[None]:
    """Calls of a module's method are noted by the forward that makes them, while any is observed.

    Forwards that wait end in any order: the last one puts back what was there.
    """
    key = module, reader
    forwards, replaced = _NOTED.pop(key, (0, vars(module).get(reader)))
    _NOTED[key] = forwards + 1, replaced
    if not forwards:
        method = getattr(module, reader)

        @wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            sequences = _OBSERVING.get()
            if sequences is None:
                return method(*args, **kwargs)
            with sequences.reading(reader, (*args, *kwargs.values())):
                return method(*args, **kwargs)

        setattr(module, reader, noting)
    try:
        yield
    finally:
        forwards, replaced = _NOTED.pop(key)
        if forwards > 1:
            _NOTED[key] = forwards - 1, replaced
        elif replaced is None:
            delattr(module, reader)
        else:
            setattr(module, reader, replaced)


def kinds_of_text(config: Any, batch: Batch) -> Tensor | None:
    """The kinds of `input_ids`, uint8 `[batch, tokens]`; None without."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    kinds = torch.full_like(ids, TokenKind.TEXT, dtype=torch.uint8)
    found = False
    configs = [config, *(value for _, value in sub_configs(config))]
    if any(hasattr(each, "cross_attention_layers") for each in configs):
        configs = []  # images are attended to, a placeholder is a word
    for each in configs:
        for name, value in vars(each).items():
            match = _PLACEHOLDER.match(name)
            if match and isinstance(value, int):
                found = True
                kinds[ids == value] = int(TokenKind[match[1].upper()])
    types = batch.get("mm_token_type_ids")
    if not found and types is not None:
        kinds[types == 1] = int(TokenKind.IMAGE)
        kinds[types == 2] = int(TokenKind.VIDEO)
    positions = batch.get("image_embeds_position_mask")
    if positions is not None:
        kinds[positions != 0] = int(TokenKind.IMAGE)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        kinds[mask == 0] = int(TokenKind.PADDING)
    return kinds


def _runs(marked: Tensor) -> tuple[list[int], list[int]]:
    """Row and length of each run of a bool tensor `[batch, tokens]`."""
    edges = torch.nn.functional.pad(marked.int(), (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    ends = (edges == -1).nonzero(as_tuple=True)[1]
    return rows.tolist(), (ends - starts).tolist()


def _decoders(model: nn.Module) -> set[nn.Module]:
    """The parts of encoder-decoders that write."""
    found = set()
    for module in model.modules():
        whole: Any = module
        if is_pretrained(module) and whole.config.is_encoder_decoder:
            found |= {whole.get_decoder()} - {module}
    return {part for part in found if not any(inner in found for inner in part.children())}


def _real(name: str, mask: Tensor, around: Tensor | None) -> Tensor | None:
    """Bool `[batch, tokens]`, true where a mask lets a query that is no padding read the token."""
    if mask.ndim == 2:
        return mask != 0
    if name == "pixel_attention_mask" or mask.ndim < 2:
        return None  # of pixels, not of tokens
    if name == "patch_attention_mask":
        return mask.flatten(1) != 0
    added = mask.is_floating_point() and not bool((mask > 0).any())  # to the attention scores
    read = mask > -1 if added else mask != 0
    if around is not None and read.shape[0] == len(around) and read.shape[-2] == around.shape[1]:
        rows = (around != TokenKind.PADDING).unsqueeze(-1)
        read = read & (rows if read.ndim == 3 else rows.unsqueeze(1))
    return read.flatten(1, -2).any(1)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, or views of all of it."""
    if first is second:
        return True
    return first.numel() == second.numel() > 0 and first.data_ptr() == second.data_ptr()


def _start(inputs: Tensor, length: int) -> int | None:
    """Where the tokens of a view begin in the sequence of that length that it is a part of."""
    rows, step = inputs.stride(0), inputs.stride(1)
    return (inputs.storage_offset() % rows) // step if step and rows == step * length else None


@cache
def _arguments(kind: Any) -> tuple[str, ...]:
    """The names of what the forward of a class takes, without itself."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
