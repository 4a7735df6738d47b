"""Outputs of prunable layers while an adapter's streams run, real tokens first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from vlp_plugins.calibration.batches import batch_size
from vlp_plugins.calibration.moments import Site
from vlp_plugins.calibration.tokens import (
    Use,
    first_argument,
    hooked,
    kinds_of,
    modules_using,
    real_of,
    run_without_gradients,
)
from vlp_plugins.models.adapter import Adapter, Batch, Stream, TokenKind
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError


class RealTokens:
    """Brings the real tokens of a layer's outputs to the front.

    Padding on the right (what `Adapter.collate` makes) is cut down to the longest text; where it is
    elsewhere, real tokens are moved to the front in their order. So a sample's tokens are at the
    same positions in every batch. The mask is read once (a transfer, on a GPU) for all layers.
    """

    def __init__(self, real: torch.Tensor) -> None:
        """Reads a mask, bool `[batch, ...tokens]`, true where a token is real.

        Raises:
            UnsupportedError: if it is not bool.
        """
        if real.dtype != torch.bool:
            raise UnsupportedError(f"a token mask is {real.dtype}; an adapter must give bool")
        self._shape = real.shape
        real = real.flatten(1)
        in_front = (real[:, 1:] <= real[:, :-1]).all()
        longest = real.sum(1).max() if len(real) else in_front.new_zeros((), dtype=torch.long)
        self._length, right = torch.stack([longest, in_front.long()]).tolist()
        self._order = None if right else torch.argsort(real, dim=1, descending=True, stable=True)
        counts = real.sum(1, keepdim=True)
        self._padding = torch.arange(self._length, device=real.device) >= counts

    def select(self, tokens: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens up to the longest text of the batch.

        Args:
            tokens: `[batch, ...tokens, features]`, or one vector per sample `[batch, features]`
                (a pooler's output), which has no tokens to leave out.
            layer: for the error message.

        Returns:
            `[batch, T, features]`, and bool `[batch, T]`, true where that is padding; None:
            nowhere.

        Raises:
            BatchError: if the mask does not fit the tokens.
        """
        if tokens.shape[:-1] != self._shape:
            if tokens.ndim == 2 and len(tokens) == self._shape[0]:
                return tokens.unsqueeze(1), None
            raise BatchError(
                f"the output of {layer} is {list(tokens.shape)}, but the mask of its tokens is "
                f"{list(self._shape)}; if the layer sees other tokens than those, the adapter must "
                "give it a token space of its own: with ModuleAdapter, "
                "tokens={regular expression: None}, or ['attention_mask', None] in place of None "
                "for padded words and then images"
            )
        tokens = tokens.flatten(1, -2)
        if self._order is not None:
            tokens = tokens.gather(1, self._order.unsqueeze(-1).expand_as(tokens))
        return tokens[:, : self._length], self._padding


def by_sample(
    tokens: torch.Tensor, samples: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each sample that has some, in their order.

    Args:
        tokens: `[..., features]`.
        samples: int64 `[...]`, the sample of each.
        real: bool `[...]`, true where a token is real; None where all are.

    Returns:
        `[samples with tokens, T, features]`, and bool `[samples with tokens, T]`, true where that
        is padding.
    """
    flat, of = tokens.flatten(0, -2), samples.flatten()
    if real is not None:
        chosen = real.flatten().to(flat.device)
        flat, of = flat[chosen], of.to(flat.device)[chosen]
    order = torch.argsort(of, stable=True)
    _, row, counts = of[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    longest = int(counts.max()) if len(counts) else 0
    points = flat.new_zeros(len(counts), longest, flat.shape[-1])
    points[row, place] = flat[order]
    return points, torch.arange(longest, device=counts.device) >= counts.unsqueeze(1)


Padding = Literal["real", "published"]
"""At the positions of padding: zeros (`real`), or the outputs of the layer."""


@dataclass(frozen=True, slots=True)
class Output:
    """The output of one call of one layer.

    Attributes:
        site: weight, stream and owner.
        module: dotted path.
        call: index of the call in its stream; most modules are called once. Calls that share
            their samples (`Places.whole`) are one.
        tokens: `[batch, T, features]`, on the model's device.
        padding: bool `[batch, T]`, true where the point has zeros instead; None: nowhere.
        kinds: uint8 `[batch, T]`, the `TokenKind`s; None if they were not asked for.
    """

    site: Site
    module: str
    call: int
    tokens: torch.Tensor
    padding: torch.Tensor | None
    kinds: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers per sample."""
        return self.tokens.shape[1] * self.tokens.shape[2]


class OutputProbe:
    """Hooks on every module that uses a prunable weight."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        *,
        padding: Padding = "real",
        published: bool = False,
        kinds: bool = False,
    ) -> None:
        """Changes nothing yet.

        Args:
            model: a model that `adapter` claims.
            adapter: of the model.
            weights: `WeightMap.of(model, adapter)`.
            padding: `real`: a point holds the real tokens of its sample in their order, then zeros;
                `published`: the outputs for the padding of the batch, too.
            published: run the published streams.
            kinds: say of what kind each token is.
        """
        self.model = model
        self._kinds = kinds
        self._adapter = adapter
        self._weights = weights
        self._padding = padding
        self._published = published
        self._stream: Stream | None = None
        self._size = 0
        self._take: Callable[[Output], None] = lambda _: None
        self._calls: Counter[Site] = Counter()
        self._masks: dict[int, tuple[torch.Tensor, RealTokens]] = {}
        self._parts: dict[Site, list[_Part]] = {}

    @contextmanager
    def attached(self) -> Iterator[OutputProbe]:
        """The model under hooks, in evaluation mode; as it was found on leaving."""
        with hooked(self.model) as hooks:
            for path, module, uses in modules_using(self.model, self._weights):
                hooks.append(module.register_forward_hook(self._hook(path, uses), with_kwargs=True))
            yield self

    def run(
        self,
        batch: Batch,
        take: Callable[[Output], None],
        wanted: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Runs the streams of one batch; to be called inside `attached`.

        Args:
            batch: tensors on the model's device.
            take: called with every output, which lives no longer than the call.
            wanted: whether a stream of that name runs; no stream runs after the first that does
                not.

        Raises:
            BatchError: if an output does not fit the samples of the batch or the mask of its
                tokens.
            UnsupportedError: if a stream does not say which tokens are real, or an output is no
                tensor.
        """
        self._size, self._take = batch_size(batch), take
        try:
            run_without_gradients(self.model, lambda: self._run(batch, wanted))
        finally:
            self._take = lambda _: None
            self._masks.clear()
            self._parts.clear()

    def _run(self, batch: Batch, wanted: Callable[[str], bool]) -> None:
        for stream in self._adapter.streams(self.model, batch, published=self._published):
            if not wanted(stream.name):
                return
            self._calls.clear()
            self._stream = stream
            try:
                stream.run()
            finally:
                self._stream = None
            for site, parts in self._parts.items():
                self._take(_together(site, parts))
            self._parts.clear()

    def _hook(self, path: str, uses: list[Use]) -> Callable[..., None]:
        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._stream is None:
                return
            inputs = first_argument(args, kwargs)
            tokens = self._tokens(path, module, output)
            # Several matrices of one module have one output: see `measure`.
            for use in uses[:1] if uses[0].owner.view is not None else uses:
                site = Site(use.weight, self._stream.name, use.index)
                self._see(site, path, use, inputs, tokens)

        return see

    def _kinds_of(self, use: Use, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The kinds of tokens, uint8 of their leading dimensions."""
        assert self._stream is not None
        kinds = kinds_of(self._adapter, self._stream, use.owner, inputs)
        lead = tokens.shape[:-1]
        if isinstance(kinds, TokenKind) or kinds.shape != lead:
            real = real_of(self._adapter, self._stream, use.owner, inputs)
            plain = kinds if isinstance(kinds, TokenKind) else TokenKind.TEXT
            kinds = torch.full(lead, int(plain), dtype=torch.uint8, device=tokens.device)
            if real is not None and real.shape == lead:
                kinds = kinds * real.to(kinds.device)
        return kinds.to(tokens.device)

    def _tokens(self, path: str, module: nn.Module, output: Any) -> torch.Tensor:
        """`[batch, ...tokens, features]`; a convolution's features are its channels."""
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, torch.Tensor) or not output.ndim:
            raise UnsupportedError(
                f"{path}, a {type(module).__name__}, gives out {type(output).__name__}, whose "
                "dimension cannot be measured; exclude it (ModuleAdapter(exclude=...))"
            )
        if isinstance(module, nn.Conv2d):
            output = output.unsqueeze(0) if output.ndim == 3 else output
            output = output.flatten(2).transpose(1, 2)
        return output

    def _check_size(self, path: str, output: torch.Tensor) -> None:
        """Raises `BatchError` if dimension 0 is not the samples'."""
        if output.ndim < 2 or len(output) != self._size:
            raise BatchError(
                f"the output of {path} is {list(output.shape)}, but the batch has {self._size} "
                "samples; a point is what a layer gives out for one sample, so the first "
                "dimension must be theirs: exclude layers that rearrange samples "
                "(ModuleAdapter(exclude=...))"
            )

    def _see(
        self, site: Site, path: str, use: Use, inputs: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Takes the output of a call, or keeps it for those that have the rest of its samples."""
        assert self._stream is not None
        call = self._calls[site]
        self._calls[site] += 1
        real = None
        if self._padding == "real":
            real = real_of(self._adapter, self._stream, use.owner, inputs)
        kinds = self._kinds_of(use, inputs, tokens) if self._kinds else None
        if self._stream.samples is not None:
            places = self._stream.samples(use.owner, tokens.shape[:-1], call)
            if places is not None:
                part = _Part(path, tokens, places.samples, real, kinds)
                if places.whole:
                    self._take(_together(site, [part], call))
                else:
                    self._parts.setdefault(site, []).append(part.kept())
                return
        self._check_size(path, tokens)
        found, padding = self._in_front(path, tokens, real)
        if kinds is not None:
            kinds = self._in_front(path, kinds.unsqueeze(-1), real)[0][..., 0]
        self._take(Output(site, path, call, found, padding, kinds))

    def _in_front(
        self, path: str, tokens: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, T, features]`, and where that is padding."""
        if real is None:
            return (tokens.unsqueeze(1) if tokens.ndim == 2 else tokens.flatten(1, -2)), None
        real = real.to(tokens.device)
        if id(real) not in self._masks:  # the same mask is for many layers
            self._masks[id(real)] = (real, RealTokens(real))
        return self._masks[id(real)][1].select(tokens, path)


@dataclass(frozen=True, slots=True)
class _Part:
    """The output of a call, `[..., features]`, with the sample and the kind of each position."""

    module: str
    tokens: torch.Tensor
    samples: torch.Tensor
    real: torch.Tensor | None
    kinds: torch.Tensor | None

    @property
    def is_real(self) -> torch.Tensor:
        """Bool, of all positions one after the other."""
        if self.real is None:
            return self.samples.new_ones(self.samples.numel(), dtype=torch.bool)
        return self.real.flatten().to(self.samples.device)

    def kept(self) -> _Part:
        """The same, whatever the model does to the output then."""
        return replace(self, tokens=self.tokens.clone())


def _together(site: Site, parts: Sequence[_Part], call: int = 0) -> Output:
    """The output of calls that share their samples: of each its tokens, call by call."""
    samples = torch.cat([part.samples.flatten() for part in parts])
    tokens = torch.cat([part.tokens.flatten(0, -2) for part in parts])
    real = None
    if any(part.real is not None for part in parts):
        real = torch.cat([part.is_real for part in parts])
    found, padding = by_sample(tokens, samples, real)
    marks = [part.kinds.flatten() for part in parts if part.kinds is not None]
    kinds = by_sample(torch.cat(marks).unsqueeze(-1), samples, real)[0][..., 0] if marks else None
    return Output(site, parts[0].module, call, found, padding, kinds)
