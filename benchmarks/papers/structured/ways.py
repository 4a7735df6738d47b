"""The importances that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from vlp_plugins.hosts.torch_pruning.importance import Importance
from vlp_plugins.hosts.torch_pruning.structured import prune_structured
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.structured.cuts import prepare

LAMBDA = 1e-8
"""Of CHITA: as in `benchmarks.papers.id_gain`."""
DENSE = "dense"
RANDOM = "random"


@dataclass(frozen=True)
class Way:
    """An importance and how it is made.

    Attributes:
        name: in the table and in the names of files.
        method: registered name; None for one of Torch-Pruning's own.
        options: of `Importance`.
        batch_size: of the calibration pairs.
        samples: calibration pairs at most; None: all of a seed.
    """

    name: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    samples: int | None = None

    def cut(
        self, model: nn.Module, adapter: Adapter, batches: Sequence[Batch], seed: int, **plan: Any
    ) -> None:
        """Cuts a model in place by this importance; `dense` leaves it whole.

        Args:
            model: a demo model.
            adapter: of the model.
            batches: calibration pairs of the seed.
            seed: of what is drawn.
            plan: of `prune_structured`.
        """
        if self.name == DENSE:
            return
        prepare(model, adapter)
        if self.method is not None:
            importance: Any = Importance(
                self.method, model, batches, adapter=adapter, seed=seed, **self.options
            )
        else:
            importance = _OF_TORCH_PRUNING[self.name]()
            if self.name == "tp-taylor":
                _backward(model, adapter, batches)
        prune_structured(model, importance=importance, adapter=adapter, **plan)
        model.zero_grad(set_to_none=True)


_OF_TORCH_PRUNING: dict[str, Callable[[], Any]] = {
    "tp-magnitude": tp.importance.GroupMagnitudeImportance,
    "tp-taylor": tp.importance.GroupTaylorImportance,
}

WAYS = (
    Way(DENSE),
    Way("multiflow", "multiflow"),
    Way("multiflow-elements", "multiflow", {"neurons": False}),
    Way("chita", "chita", {"lambda": LAMBDA}, 2, 64),
    Way("omp", "omp"),
    Way("tp-magnitude"),
    Way("tp-taylor"),
    Way(RANDOM, "random"),
)


def ways(names: Sequence[str] | None = None) -> list[Way]:
    """All, or those named; any other registered method may be named, too."""
    known = {way.name: way for way in WAYS}
    return list(WAYS) if names is None else [known.get(n, Way(n, n)) for n in names]


def _backward(model: nn.Module, adapter: Adapter, batches: Sequence[Batch]) -> None:
    """Gradients of the pre-training loss, summed over batches, as the Taylor expansion needs."""
    with _unchanged(adapter.loss_state(model)):
        for batch in batches:
            torch.stack(list(adapter.losses(model, batch).values())).sum().backward()


@contextmanager
def _unchanged(state: Iterable[torch.Tensor]) -> Iterator[None]:
    """Gives what the losses change its values back."""
    kept = [(tensor, tensor.detach().clone()) for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)
