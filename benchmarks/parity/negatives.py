"""An adapter whose matching loss takes the recorded hard negatives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlp_plugins.models.adapter import Adapter, Batch, Negatives
from vlp_plugins.models.restricted import DelegatingAdapter


class RecordedNegatives(DelegatingAdapter):
    """Another adapter with the negatives of a recorded run, in the order of its forwards.

    The published code draws them from the global generator, ours from the batch.
    """

    def __init__(self, adapter: Adapter, negatives: Sequence[Negatives]) -> None:
        """Wraps an adapter.

        Args:
            adapter: what does everything else.
            negatives: one pair per forward with losses; none at all if the family draws none.
        """
        super().__init__(adapter)
        self._negatives = list(negatives)
        self._forwards = 0

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
        return super().losses(model, batch, negatives=negatives, published=published)
