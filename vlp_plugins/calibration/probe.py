"""Takes statistics of the inputs of prunable weights while an adapter's streams run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlp_plugins.calibration.once import MeasuredOnce
from vlp_plugins.calibration.tokens import TokenReader, reader_of
from vlp_plugins.calibration.watching import Use, real_of, run_quietly, uses_of, watched
from vlp_plugins.models.adapter import Adapter, Batch, Owner, Stream
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.statistics.base import ActivationStatistic, Key, Site, distinct


class ActivationProbe:
    """Measures statistics at every use of every weight, tensors that several layers read once."""

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
        self._found: list[tuple[Key, Owner, torch.Tensor]] = []
        self._once = MeasuredOnce()

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self._statistics)

    @contextmanager
    def attached(self) -> Iterator[ActivationProbe]:
        """Hooks on the model, which is in evaluation mode meanwhile.

        On leaving, hooks and training flags (of every single module) are as they were.

        Raises:
            UnsupportedError: if a module cannot be measured (a grouped convolution).
        """
        with watched(self._model) as hooks:
            watching = uses_of(self._model, self._weights) if self._statistics else ()
            for path, module, uses in watching:
                hook = self._hook(path, uses, reader_of(path, module))
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
            run_quietly(self._model, lambda: self._run(batch))
            return self._collect(index)
        finally:
            self._found.clear()
            self._once.clear()

    def _run(self, batch: Batch) -> None:
        """Every stream of a batch, under the hooks."""
        for stream in self._adapter.streams(self._model, batch, published=self._published):
            self._stream = stream
            try:
                stream.run()
            finally:
                self._stream = None

    def _hook(
        self, path: str, uses: list[Use], reader: TokenReader
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stream is None:
                return
            inputs = args[0] if args else next(iter(kwargs.values()))
            for use in uses:
                real = real_of(self._adapter, self._stream, use.owner)
                site = Site(use.weight, self._stream.name, use.index)
                for statistic in self._statistics:
                    value = self._once.value(statistic, inputs, real, reader)
                    size = self._sizes[statistic.name, use.weight]
                    if value.shape != (size,):
                        raise UnsupportedError(
                            f"{statistic.name} of {path} is {list(value.shape)}, but weight "
                            f"{use.weight!r} needs [{size}]; adapter {self._adapter.name!r} gives "
                            "the weight to a module with another number of inputs"
                        )
                    self._found.append(((statistic.name, site), use.owner, value))

        return see

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
