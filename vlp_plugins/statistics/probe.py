"""Takes statistics of the inputs of prunable weights while an adapter's streams run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlp_plugins.adapter import Adapter, Batch, Owner, Stream
from vlp_plugins.errors import NonFiniteError, UnsupportedError
from vlp_plugins.statistics.base import ActivationStatistic, Site
from vlp_plugins.statistics.store import Key
from vlp_plugins.statistics.tokens import TokenReader, reader_of
from vlp_plugins.weights import WeightMap


@dataclass(frozen=True, slots=True)
class _Use:
    """One module as the user of one weight."""

    weight: str
    index: int
    owner: Owner


@dataclass(frozen=True, slots=True)
class _Known:
    """A value that was measured in this batch, and of what."""

    inputs: weakref.ref[torch.Tensor]
    version: int
    real: torch.Tensor | None
    value: torch.Tensor


class ActivationProbe:
    """Measures statistics at every use of every weight.

    A tensor that enters several layers (query, key and value; the image embeddings that all
    cross-attention layers read) is measured once per batch. It is recognised by its identity, its
    version counter and its token mask, never by its values. Tensors are known by weak references:
    no activation lives longer than it would without the probe.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        statistics: Sequence[ActivationStatistic],
        *,
        published: bool = False,
    ) -> None:
        self._model = model
        self._adapter = adapter
        self._weights = weights
        self._statistics = tuple({s.name: s for s in statistics}.values())
        self._published = published
        self._sizes = {
            (s.name, name): s.size(weights[name]) for s in statistics for name in weights
        }
        self._uses: dict[str, list[_Use]] = {}
        for name, weight in weights.items():
            for index, owner in enumerate(weight.owners):
                self._uses.setdefault(owner.module, []).append(_Use(name, index, owner))
        self._stream: Stream | None = None
        self._found: list[tuple[Key, Owner, torch.Tensor]] = []
        self._known: dict[tuple[Any, ...], _Known] = {}

    @contextmanager
    def attached(self) -> Iterator[ActivationProbe]:
        """Hooks on the model, which runs in evaluation mode without gradients meanwhile.

        On leaving, hooks and training flags (of every single module) are as they were.

        Raises:
            UnsupportedError: if a module cannot be measured (a grouped convolution).
        """
        training = [(module, module.training) for module in self._model.modules()]
        hooks: list[Any] = []
        try:
            for path in self._uses if self._statistics else ():
                module = self._model.get_submodule(path)
                hook = self._hook(path, reader_of(path, module))
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._model.eval()
            with torch.no_grad():  # not inference mode: its tensors have no version counter
                yield self
        finally:
            for handle in hooks:
                handle.remove()
            for module, flag in training:
                module.training = flag

    def measure(self, batch: Batch, index: int) -> dict[Key, torch.Tensor]:
        """Runs the streams of one batch; to be called inside `attached`.

        Args:
            batch: tensors on the model's device.
            index: of the batch, for error messages.

        Returns:
            By statistic and site float64 `[size]` on CPU; a site that no stream ran is absent.

        Raises:
            BatchError: if an input does not fit the mask of its tokens.
            UnsupportedError: if a stream does not say which tokens are real.
            NonFiniteError: if an input holds NaN or infinity.
        """
        device = next(self._model.parameters()).device
        try:
            # A stream that draws random numbers must not disturb those of the caller.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                streams = self._adapter.streams(self._model, batch, published=self._published)
                for stream in streams:
                    self._stream = stream
                    try:
                        stream.run()
                    finally:
                        self._stream = None
            return self._collect(index)
        finally:
            self._found.clear()
            self._known.clear()

    def _hook(
        self, path: str, reader: TokenReader
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stream is None:
                return
            inputs = args[0] if args else next(iter(kwargs.values()))
            for use in self._uses[path]:
                real = self._real(use.owner)
                site = Site(use.weight, self._stream.name, use.index)
                for statistic in self._statistics:
                    value = self._value(statistic, inputs, real, reader)
                    size = self._sizes[statistic.name, use.weight]
                    if value.shape != (size,):
                        raise UnsupportedError(
                            f"{statistic.name} of {path} is {list(value.shape)}, but weight "
                            f"{use.weight!r} needs [{size}]; adapter {self._adapter.name!r} gives "
                            "the weight to a module with another number of inputs"
                        )
                    self._found.append(((statistic.name, site), use.owner, value))

        return see

    def _real(self, owner: Owner) -> torch.Tensor | None:
        assert self._stream is not None
        try:
            return self._stream.real[owner.tokens]
        except KeyError:
            raise UnsupportedError(
                f"adapter {self._adapter.name!r}: stream {self._stream.name!r} does not say which "
                f"tokens of {owner.tokens!r} are real, which {owner.module} reads (it says: "
                f"{', '.join(self._stream.real) or 'nothing'}); add {owner.tokens!r} to "
                "Stream.real, with None if all are"
            ) from None

    def _value(
        self,
        statistic: ActivationStatistic,
        inputs: torch.Tensor,
        real: torch.Tensor | None,
        reader: TokenReader,
    ) -> torch.Tensor:
        key = (id(inputs), statistic.name, reader.key)
        known = self._known.get(key)
        if (
            known is not None
            and known.inputs() is inputs  # an id can be used again after its tensor has gone
            and known.version == inputs._version
            and known.real is real
        ):
            return known.value
        value: torch.Tensor | None = None
        for tokens in reader.read(inputs, real):
            part = statistic.measure(tokens)
            value = part if value is None else value + part
        assert value is not None
        self._known[key] = _Known(weakref.ref(inputs), inputs._version, real, value)
        return value

    def _collect(self, index: int) -> dict[Key, torch.Tensor]:
        """Sums the calls of each site, after one transfer and one look for NaN."""
        if not self._found:
            return {}
        distinct = {id(value): value for _, _, value in self._found}
        joined = torch.cat(list(distinct.values())).cpu().double()
        self._check_finite(joined, index)
        parts = dict(zip(distinct, joined.split([len(v) for v in distinct.values()]), strict=True))
        sums: dict[Key, torch.Tensor] = {}
        for key, _, value in self._found:
            part = parts[id(value)]
            sums[key] = sums[key] + part if key in sums else part
        return sums

    def _check_finite(self, joined: torch.Tensor, index: int) -> None:
        if bool(torch.isfinite(joined).all()):
            return
        for (_, site), owner, value in self._found:  # in the order of the calls
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"the input of {owner.module} (weight {site.weight!r}, stream "
                    f"{site.stream!r}) holds NaN, infinity or values whose square overflows, in "
                    f"batch {index}; look at that batch, at the checkpoint (weights after a "
                    "diverged training), or run the model in float32"
                )
