"""A model that knows the right answers: image and text carry the same number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlp_plugins.models.adapter import Adapter, Batch, Stream, WeightSpec

WORDS = 50


class PairModel(nn.Module):
    """Embeds numbers below WORDS; a dropout that would spoil everything in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 16)
        self.table.weight.data = torch.randn(WORDS, 16, generator=torch.manual_seed(0))
        self.spoiler = nn.Dropout(0.9)
        self.frozen = nn.Dropout(0.9).eval()
        self.asked: list[tuple[int, int]] = []

    def forward(self, numbers: Tensor) -> Tensor:
        embedded = self.frozen(self.spoiler(self.table(numbers)))
        return nn.functional.normalize(embedded, dim=-1)


class PairAdapter(Adapter):
    """`pixel_values[:, 0]` is the number of an image; the last real token that of a text."""

    name = "pairs"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, PairModel)

    def weights(self, model: nn.Module) -> list[WeightSpec]:
        return []

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        return iter(())

    def image_features(self, model: nn.Module, batch: Batch) -> Tensor:
        features: Tensor = model(batch["pixel_values"][:, 0].long())
        return features

    def text_features(self, model: nn.Module, batch: Batch) -> Tensor:
        features: Tensor = model(self.said(batch))
        return features

    def match(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, PairModel)
        shown, said = batch["pixel_values"][:, 0].long(), self.said(batch)
        model.asked += zip(shown.tolist(), said.tolist(), strict=True)
        return torch.where(shown == said, 3.0, -3.0)

    def caption(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> Tensor:
        assert not model.training
        numbers = batch["pixel_values"][:, 0].long()
        return torch.stack([torch.full_like(numbers, 2), numbers], dim=1)[:, :max_length]

    @staticmethod
    def said(batch: Batch) -> Tensor:
        last = batch["attention_mask"].sum(1) - 1
        ids: Tensor = batch["input_ids"]
        return ids[torch.arange(len(ids)), last]


def batch_of(images: list[int], texts: list[int], length: int = 5) -> dict[str, Any]:
    """Texts of different lengths, padded on the right with token 9."""
    ids = torch.full((len(texts), length), 9)
    mask = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        real = 1 + row % length
        ids[row, :real] = text
        mask[row, :real] = 1
    pixels = torch.tensor(images, dtype=torch.float32)[:, None].repeat(1, 3)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
