"""Models to cut by Torch-Pruning: those of the tests of structured pruning, and the golden BLIP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from structured_examples import MAKERS, made
from torch import Tensor, nn

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.hosts.torch_pruning.options import pruner_options, shared_modules
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.parts import Block
from vlp_plugins.structured.cuts import prepare
from vlp_plugins.structured.survey import blocks_of

__all__ = ["MAKERS", "made"]

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"


def golden(*, whole: bool = False) -> tuple[Any, Adapter]:
    """BLIP's pre-training model with shared text towers; its projections split unless `whole`."""
    model = model_from_golden(GOLDEN)
    adapter = registry().adapter_for(model)
    if not whole:
        prepare(model, adapter)
    return model, adapter


def golden_batches() -> list[dict[str, Tensor]]:
    return [dict(batch) for batch in batches_from_golden(GOLDEN)[:4]]


@contextmanager
def stock_pruner(
    model: nn.Module, adapter: Adapter, importance: Any, **options: Any
) -> Iterator[tp.pruner.BasePruner]:
    """Torch-Pruning's own pruner, as the documentation says."""
    with shared_modules(model):
        told = pruner_options(adapter, model, **options)
        yield tp.pruner.BasePruner(model, importance=importance, **told)


def named(model: nn.Module, adapter: Adapter, name: str) -> Block:
    return next(block for block in blocks_of(model, adapter) if block.name == name)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_values(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(value, before[name]) for name, value in now.items()
    )
