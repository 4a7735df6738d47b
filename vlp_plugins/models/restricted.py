"""Adapters that are another adapter except for what a subclass overrides."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    Exclusion,
    Negatives,
    OriginalPart,
    Stream,
    WeightSpec,
)
from vlp_plugins.models.weights import WeightMap

if TYPE_CHECKING:
    from PIL.Image import Image


class DelegatingAdapter(Adapter):
    """Delegates every method of `Adapter` to another one, but not those of tasks (captions, ...).

    Attributes:
        adapter: the other one.
    """

    def __init__(self, adapter: Adapter) -> None:
        """Goes by the name of `adapter`."""
        self.name = adapter.name
        self.takes_sequences = adapter.takes_sequences
        self.adapter = adapter

    def claims(self, model: nn.Module) -> bool:
        return self.adapter.claims(model)

    def weights(self, model: nn.Module) -> Iterable[WeightSpec]:
        return self.adapter.weights(model)

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        return self.adapter.streams(model, batch, published=published)

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        return self.adapter.exclusions(model)

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return self.adapter.blocks(model)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        return self.adapter.losses(model, batch, negatives=negatives, published=published)

    def loss_state(self, model: nn.Module) -> Iterable[Tensor]:
        return self.adapter.loss_state(model)

    def advance(self, model: nn.Module, batch: Batch, *, published: bool = False) -> None:
        self.adapter.advance(model, batch, published=published)

    def split_fused(self, model: nn.Module) -> None:
        self.adapter.split_fused(model)

    def followers(self, model: nn.Module) -> dict[str, str]:
        return self.adapter.followers(model)

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        return self.adapter.for_task(task, model)

    def downstream_model(
        self,
        task: str,
        model: nn.Module,
        *,
        tokenizer: Any | None = None,
        classes: int | None = None,
    ) -> nn.Module:
        return self.adapter.downstream_model(task, model, tokenizer=tokenizer, classes=classes)

    def task_losses(self, task: str, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.adapter.task_losses(task, model, batch)

    def load(self, source: str) -> nn.Module | None:
        return self.adapter.load(source)

    def describe(self, source: str) -> str | None:
        return self.adapter.describe(source)

    def collate(
        self, processor: Any, images: Sequence[Image], texts: Sequence[str]
    ) -> dict[str, Tensor]:
        return self.adapter.collate(processor, images, texts)

    def settings(self) -> dict[str, Any]:
        return self.adapter.settings()

    def original_name(self, path: str) -> str | None:
        return self.adapter.original_name(path)

    def original_part(self, path: str) -> OriginalPart | None:
        return self.adapter.original_part(path)


class Within(DelegatingAdapter):
    """Another adapter, restricted to some of its weights."""

    def __init__(self, adapter: Adapter, names: Collection[str]) -> None:
        """Restricts `adapter` to the weights of these canonical names."""
        super().__init__(adapter)
        self._names = frozenset(names)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """The specs of the chosen weights, and of those that share memory with one."""
        found = WeightMap.of(model, self.adapter)
        paths = {path for name in self._names for path in found[name].aliases}
        return (s for s in self.adapter.weights(model) if s.owners[0].path in paths)
