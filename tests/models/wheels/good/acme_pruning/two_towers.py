"""A model of two linear towers, and the adapter that describes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from vlp_plugins.extend import Adapter, Batch, Exclusion, Owner, Stream, WeightSpec, need


class TwoTowers(nn.Module):
    """Images and texts as vectors of 8 numbers, embedded in 4."""

    def __init__(self) -> None:
        """Makes both towers and the temperature."""
        super().__init__()
        self.image_tower = nn.Linear(8, 4)
        self.text_tower = nn.Linear(8, 4)
        self.temperature = nn.Parameter(torch.ones(()))


class TwoTowersAdapter(Adapter):
    """Names the two weights `vision.0.projection` and `text.0.projection`."""

    name = "two_towers"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, TwoTowers)

    def weights(self, model: nn.Module) -> Iterable[WeightSpec]:
        yield WeightSpec("vision.0.projection", "vision", 0, (Owner("image_tower", "vision"),))
        yield WeightSpec("text.0.projection", "text", 0, (Owner("text_tower", "text"),))

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        yield Exclusion(r"temperature", "a scalar")

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        images, texts = need(batch, "images", "texts")
        yield Stream("vision", lambda: model.get_submodule("image_tower")(images))
        yield Stream("text", lambda: model.get_submodule("text_tower")(texts))
