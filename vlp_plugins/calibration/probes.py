"""Probes: what a data pass measures of one batch."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.moments import (
    LOSS_STREAM,
    ActivationStatistic,
    Key,
    LossStatistic,
    Site,
    Statistic,
    distinct,
)
from vlp_plugins.calibration.sums import LargeSums
from vlp_plugins.calibration.tokens import (
    TokenReader,
    Use,
    check_reached,
    first_argument,
    hooked,
    modules_using,
    named,
    reader_of,
    real_of,
    run_without_gradients,
)
from vlp_plugins.models.adapter import Adapter, Batch, Owner, Stream
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError, UnsupportedError
from vlp_plugins.runtime.offload import at_hand, device_of
from vlp_plugins.runtime.parallel import on_host
from vlp_plugins.runtime.sharding import at_rest, is_sharded, whole

logger = logging.getLogger("vlp_plugins.calibration")


_Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Choose = Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor | None]


class _Measured(NamedTuple):
    inputs: weakref.ref[torch.Tensor]
    version: int
    real: torch.Tensor | None
    value: torch.Tensor


class ActivationProbe:
    """Measures statistics at every use of every weight, tensors that several layers read once.

    Query, key and value read one tensor, all cross-attention layers read the same image
    embeddings. A tensor is recognised by its identity, its version counter and the identity of its
    token mask, never by its values. The probe keeps a weak reference only: no activation lives
    longer than it would without the measurement. A tensor made in inference mode (a view of a
    parameter that was) has no version counter and is measured every time.
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
        self._statistics = distinct(statistics)
        self._published = published
        self._sizes = {
            (s.name, name): s.size(weights[name]) for s in self._statistics for name in weights
        }
        self._stream: Stream | None = None
        self._names: Collection[str] | None = None
        self._choose: Choose | None = None
        self._hooks: dict[str, tuple[nn.Module, _Hook]] = {}
        self._found: list[tuple[Key, Owner, torch.Tensor]] = []
        self._measured: dict[tuple[object, ...], _Measured] = {}

    @contextmanager
    def attached(self) -> Iterator[ActivationProbe]:
        """Hooks on the model, in evaluation mode; the model is as it was on leaving.

        Raises:
            UnsupportedError: if a module cannot be measured (a grouped convolution).
        """
        with hooked(self._model) as hooks:
            modules = modules_using(self._model, self._weights) if self._statistics else ()
            for path, module, uses in modules:
                hook = self._hook(path, uses, reader_of(path, module))
                self._hooks[path] = module, hook
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield self

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
        try:
            run_without_gradients(self._model, lambda: self._run(batch))
            return self._collect(index)
        finally:
            self._found.clear()
            self._measured.clear()

    @contextmanager
    def reading(
        self, stream: Stream, names: Collection[str], choose: Choose | None = None
    ) -> Iterator[None]:
        """Measures what runs meanwhile, a part of a stream; inside `attached`.

        Args:
            stream: that the part is of.
            names: canonical names of the weights to measure.
            choose: takes a name, an input and which of its tokens are real, and returns which of
                them count.
        """
        self._stream, self._names, self._choose = stream, names, choose
        try:
            yield
        finally:
            self._stream = self._names = self._choose = None

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measures a call of a module that is made without its hooks; inside `reading`."""
        if path in self._hooks:
            module, hook = self._hooks[path]
            hook(module, args, kwargs)

    def taken(self) -> list[tuple[Key, Owner, torch.Tensor]]:
        """What was measured since the last call: key, module, and the statistic, float32."""
        found, self._found = self._found, []
        self._measured.clear()
        return found

    def _run(self, batch: Batch) -> None:
        for stream in self._adapter.streams(self._model, batch, published=self._published):
            self._stream = stream
            try:
                stream.run()
            finally:
                self._stream = None

    def _hook(self, path: str, uses: list[Use], reader: TokenReader) -> _Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stream is None:
                return
            first = first_argument(args, kwargs)
            for use in uses:
                if self._names is not None and use.weight not in self._names:
                    continue
                inputs = first
                real = real_of(self._adapter, self._stream, use.owner, first)
                if self._choose is not None:
                    real = self._choose(use.weight, first, real)
                if (view := use.owner.view) is not None and view.reads is not None:
                    with at_hand(module):
                        inputs, real = view.reads(module, args, kwargs, real)
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

        return hook

    def _value(
        self,
        statistic: ActivationStatistic,
        inputs: torch.Tensor,
        real: torch.Tensor | None,
        reader: TokenReader,
    ) -> torch.Tensor:
        """The statistic of the real tokens of an input; the same object for the same input."""
        key = (id(inputs), statistic.name, reader.key)
        version = None if inputs.is_inference() else inputs._version
        known = self._measured.get(key)
        if (
            known is not None
            and known.inputs() is inputs  # an id is used again after its tensor has gone
            and known.version == version
            and known.real is real
        ):
            return known.value
        parts = [statistic.measure(tokens) for tokens in reader.read(inputs, real)]
        value = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        if version is not None:
            self._measured[key] = _Measured(weakref.ref(inputs), version, real, value)
        return value

    def _collect(self, index: int) -> dict[Key, torch.Tensor]:
        """Sums the calls of each site, after one transfer and one look for NaN."""
        if not self._found:
            return {}
        distinct = {id(value): value for _, _, value in self._found}
        joined = on_host(list(distinct.values())).double()
        if not bool(torch.isfinite(joined).all()):
            check_measured(self._found, index)
        parts = dict(zip(distinct, joined.split([len(v) for v in distinct.values()]), strict=True))
        sums: dict[Key, torch.Tensor] = {}
        for key, _, value in self._found:
            part = parts[id(value)]
            sums[key] = sums[key] + part if key in sums else part
        return sums


def check_measured(found: Iterable[tuple[Key, Owner, torch.Tensor]], index: int) -> None:
    """Makes sure of what was measured of a batch, see `ActivationProbe.taken`.

    Raises:
        NonFiniteError: with the first module, in the order of the calls, whose input holds NaN or
            infinity.
    """
    looked: set[int] = set()
    for (_, site), owner, value in found:
        if id(value) in looked:
            continue
        looked.add(id(value))
        # NaN or infinity always shows in the sum, an overflow too, hence the second look.
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"the input of {owner.module} (weight {site.weight!r}, stream {site.stream!r}) "
                f"holds NaN, infinity or values whose square overflows, in batch {index}; look at "
                "that batch, at the checkpoint (weights after a diverged training), or run the "
                "model in float32"
            )


class Probes:
    """The probes that the statistics need, each run once per batch.

    Attributes:
        sharded: whether the model is under `fully_shard`; all processes then run every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        statistics: Sequence[Statistic],
        *,
        published: bool = False,
        autocast: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        keep_state: bool = False,
    ) -> None:
        every = distinct(statistics)
        self._activations = [s for s in every if isinstance(s, ActivationStatistic)]
        self._losses = [s for s in every if isinstance(s, LossStatistic)]
        self._weights = weights
        self._adapter = adapter
        at_rest(model)
        self.sharded = is_sharded(model.parameters())
        self._device = device_of(model)
        self._skip = skip_nonfinite
        self._keep_state = keep_state
        self._activation_probe = None
        if self._activations or not self._losses:
            self._activation_probe = ActivationProbe(
                model, adapter, weights, self._activations, published=published
            )
        self._loss_probe = None
        if self._losses:
            self._loss_probe = LossProbe(
                model,
                adapter,
                weights,
                published=published,
                autocast=autocast,
                skip_nonfinite=skip_nonfinite,
            )

    @contextmanager
    def attached(self) -> Iterator[Probes]:
        """The model ready to be measured; as it was on leaving."""
        with ExitStack() as stack:
            if self._activation_probe is not None:
                stack.enter_context(self._activation_probe.attached())
            if self._loss_probe is not None:
                stack.enter_context(self._loss_probe.attached(keep_state=self._keep_state))
            yield self

    def measure(
        self, batch: Batch, index: int, sums: LargeSums | None, half: int
    ) -> Mapping[Key, torch.Tensor] | None:
        """Runs the probes, and adds the loss statistics to one half of the sums.

        Each gradient is added as soon as it is there, and then let go; where batches may be
        skipped, all of them after everything of the batch was measured.

        Args:
            batch: to be measured.
            index: for messages.
            sums: None if another process adds them up; it needs this one to gather sharded ones.
            half: 0 or 1.

        Returns:
            Activation statistics as of `ActivationProbe.measure`. None if the batch is skipped
            because it holds NaN or infinity; nothing is added then.
        """
        batch = to_device(batch, self._device)
        values: Mapping[Key, torch.Tensor] = {}
        add = partial(self._add, sums, half)
        held: dict[str, torch.Tensor] = {}
        # The loss first: it must change its state as it does in processes that only advance.
        if self._loss_probe is not None:
            take = held.__setitem__ if self._skip else add
            if not self._loss_probe.hand_over(batch, index, take):
                return None
        if self._activation_probe is not None:
            try:
                values = self._activation_probe.measure(batch, index)
            except NonFiniteError as error:
                if not self._skip:
                    raise
                logger.warning("left batch %d out: %s", index, error)
                return None
        for name, gradient in held.items():
            add(name, gradient)
        return values

    def advance(self, batch: Batch, index: int) -> None:
        """Passes over a batch that is not measured here."""
        if self._loss_probe is not None:
            self._loss_probe.advance(batch, index)

    def _add(self, sums: LargeSums | None, half: int, name: str, gradient: torch.Tensor) -> None:
        # One at a time: of a sharded model, gradients and weights never exist whole together.
        weight, gradient = self._weights[name].values, whole(gradient)
        if sums is None:
            return
        for statistic in self._losses:
            key = (statistic.name, Site(name, LOSS_STREAM, 0))
            sums.add(key, statistic.measure(weight, gradient), half)

    def check_reached(self, sums: Mapping[Key, torch.Tensor]) -> None:
        """Raises `StatisticsError` if a weight was reached by no stream, or not by the loss."""
        by_loss = {site.weight for _, site in sums if site.stream == LOSS_STREAM}
        by_stream = {site.weight for _, site in sums if site.stream != LOSS_STREAM}
        if self._activations:
            check_reached(self._adapter, self._weights, by_stream)
        missed = [name for name in self._weights if name not in by_loss]
        if self._losses and missed:
            raise StatisticsError(
                f"the loss of adapter {self._adapter.name!r} does not depend on "
                f"{named(self._weights, missed)}; exclude it (with ModuleAdapter and "
                "TransformersAdapter: exclude=...), give a loss that uses the whole model, or a "
                "method without gradients"
            )
