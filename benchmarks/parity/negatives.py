"""An adapter whose matching loss takes the recorded hard negatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from vlp_plugins.adapter import Adapter, Batch, Exclusion, Negatives, Stream, WeightSpec


class RecordedNegatives(Adapter):
    """Another adapter with the negatives of a recorded run, in the order of its forwards.

    The published code draws them from the global generator, ours from the batch.
    """

    def __init__(self, adapter: Adapter, negatives: Sequence[Negatives]) -> None:
        """Wraps an adapter.

        Args:
            adapter: what does everything else.
            negatives: one pair per forward with losses; none at all if the family draws none.
        """
        self.name = adapter.name
        self._adapter = adapter
        self._negatives = list(negatives)
        self._forwards = 0

    def claims(self, model: nn.Module) -> bool:
        return self._adapter.claims(model)

    def weights(self, model: nn.Module) -> Iterable[WeightSpec]:
        return self._adapter.weights(model)

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        return self._adapter.streams(model, batch, published=published)

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        return self._adapter.exclusions(model)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """The losses with the negatives of the next recorded forward."""
        if self._negatives:
            negatives = self._negatives[self._forwards]
            self._forwards += 1
        return self._adapter.losses(model, batch, negatives=negatives, published=published)

    def loss_state(self, model: nn.Module) -> Iterable[Tensor]:
        return self._adapter.loss_state(model)

    def advance(self, model: nn.Module, batch: Batch, *, published: bool = False) -> None:
        self._adapter.advance(model, batch, published=published)

    def settings(self) -> dict[str, Any]:
        return self._adapter.settings()

    def original_name(self, path: str) -> str | None:
        return self._adapter.original_name(path)
