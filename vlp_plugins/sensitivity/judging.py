"""Loss and retrieval of a model on the same batches, as often as it is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.evaluation.retrieval import retrieval
from vlp_plugins.models.adapter import Adapter, Batch, RetrievalAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError
from vlp_plugins.sensitivity.curves import Point


class Judge:
    """Measures a model; the same model gives the same figures every time."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        batches: Sequence[Batch],
        *,
        retrieve: bool,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: is left as it is found, with what its losses change.
            adapter: claims it.
            weights: its prunable weights.
            batches: pairs of images and texts.
            retrieve: measure R@1 among all pairs, too, if the adapter embeds images and texts.
        """
        self._model = model
        self._adapter = adapter
        self._batches = batches
        self._probe = LossProbe(model, adapter, weights)
        self.retrieves = retrieve and isinstance(adapter, RetrievalAdapter)

    def dense(self) -> Point:
        """The model as it was.

        Raises:
            NonFiniteError: if its loss on a batch is not finite.
            UnsupportedError: if the family has no loss.
        """
        point = self.measure(0.0, 0)
        for index, loss in enumerate(point.losses):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of the dense model on batch {index} is NaN or infinite; look at "
                    "that batch and at the checkpoint"
                )
        return point

    def measure(self, sparsity: float, removed: int) -> Point:
        """The model as it is now.

        Args:
            sparsity: that was asked for.
            removed: how many elements went.
        """
        with self._probe.attached(()) as probe:
            losses = tuple(probe.loss(batch, index) for index, batch in enumerate(self._batches))
        if not self.retrieves:
            return Point(sparsity, removed, losses)
        recall = retrieval(self._model, self._adapter, self._batches, ks=(1,))
        return Point(sparsity, removed, losses, recall.image_to_text[1], recall.text_to_image[1])
