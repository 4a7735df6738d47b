"""One recorded model, and what a comparison with it says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vlp_plugins.models.adapter import Adapter, Batch, Negatives
from vlp_plugins.models.weights import WeightMap


@dataclass(frozen=True)
class Line:
    """One comparison. `worst` is in the unit that `what` names; `ok` says if it is tolerated."""

    family: str
    what: str
    detail: str
    worst: float
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "OUTSIDE"
        return f"{self.family:5} {self.what:28} {self.detail:44} {verdict}"


@dataclass(frozen=True)
class Family:
    """One recorded model and the ways to rebuild it."""

    folder: Path

    @property
    def name(self) -> str:
        """`blip`, `xvlm`, `vit`."""
        return str(json.loads((self.folder / "config.json").read_text())["family"])

    @property
    def module(self) -> Any:
        """The module of this package that knows the family."""
        return import_module(f"benchmarks.parity.{self.name}")

    def model(self) -> nn.Module:
        """A fresh model."""
        model: nn.Module = self.module.model_from_golden(self.folder)
        return model

    def batches(self, suffix: str = "") -> list[Batch]:
        """The recorded batches, by our names."""
        batches: list[Batch] = self.module.batches_from_golden(
            self.folder, f"batches{suffix}.safetensors"
        )
        return batches

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """A recorded file by its path without ending; empty if it was not recorded."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


def families(folder: Path) -> list[Family]:
    """The recorded families below a folder, by name."""
    return [Family(path.parent) for path in sorted(folder.glob("*/config.json"))]


def recorded_names(weights: WeightMap, adapter: Adapter) -> dict[str, str]:
    """Canonical name -> the name in the recorded files."""
    names = {}
    for name, weight in weights.items():
        original = adapter.original_name(weight.aliases[0])
        if original is None:
            raise ValueError(f"{name} ({weight.aliases[0]}) has no original name")
        names[name] = original
    return names


def recorded_negatives(family: Family, run: str, sparsity: str) -> list[Negatives]:
    """The hard negatives of every forward of a run; none if the family draws none.

    Args:
        family: the recorded model.
        run: `snip`, `itersnip`, ...
        sparsity: as the files write it; a run that scores once recorded its first only.
    """
    record = json.loads((family.folder / "negatives.json").read_text())
    by_sparsity = record.get(run, {})
    forwards: list[Any] = by_sparsity.get(sparsity) or next(iter(by_sparsity.values()), [])
    return [(pair["image_neg"], pair["text_neg"]) for pair in forwards]


def sequence_negatives(family: Family) -> list[Negatives]:
    """Those of all recorded batches one after the other, as `outputs.json` has them."""
    record = json.loads((family.folder / "outputs.json").read_text())
    drawn = [pair for step in record["sequence"] for pair in step["negatives"]]
    return [(pair["image_neg"], pair["text_neg"]) for pair in drawn]
