"""The toy with losses whose terms remember the batches before, as momentum contrast does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy import FEED, Toy, ToyAdapter

from vlp_plugins.models.adapter import Batch, Negatives, need


class LosingToy(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(FEED))

    def features(self, batch: Batch) -> Tensor:
        pixels, ids = need(batch, "pixel_values", "input_ids")
        return self.read(ids, self.see(pixels)).mean(1)


class LosingAdapter(ToyAdapter):
    """Terms `contrast` and `write`; `factor` makes losses and gradients larger or smaller."""

    factor = 1.0

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        assert isinstance(model, LosingToy)
        features = model.features(batch)
        contrast = (features - model.memory).square().mean() * self.factor
        self._remember(model, features)
        written = model.write(batch["input_ids"])
        return {"contrast": contrast, "write": written.square().mean() * self.factor}

    def loss_state(self, model: nn.Module) -> list[Tensor]:
        assert isinstance(model, LosingToy)
        return [model.memory]

    def advance(self, model: nn.Module, batch: Batch, *, published: bool = False) -> None:
        assert isinstance(model, LosingToy)
        self._remember(model, model.features(batch))

    @torch.no_grad()
    def _remember(self, model: LosingToy, features: Tensor) -> None:
        mean = features.mean(0)
        if mean.isfinite().all():
            model.memory.mul_(0.5).add_(mean, alpha=0.5)


def losing_toy() -> LosingToy:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return LosingToy()


def spoilt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with a pixel that is NaN."""
    pixels = batch["pixel_values"].clone()
    pixels[0, 0, 0, 0] = torch.nan
    return batch | {"pixel_values": pixels}
