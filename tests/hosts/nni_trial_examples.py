"""A tiny model with photos in folders, and a trial that keeps what it is told to report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
from vlp_command import command as command

from vlp_plugins.jobs.recipes import DataRecipe, Recipe
from vlp_plugins.masks.masks import Masks


@dataclass
class Told:
    """The trial of a tuner that wrote down what it drew."""

    drawn: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = "exp"
    name: str = "one"
    number: int = 0
    reported: list[Mapping[str, float]] = field(default_factory=list)
    ended: list[Mapping[str, float]] = field(default_factory=list)

    def intermediate(self, result: Mapping[str, float]) -> None:
        self.reported.append(result)

    def final(self, result: Mapping[str, float]) -> None:
        self.ended.append(result)


def save_world(folder: Path) -> Path:
    """`blip`, `vit`, and the photos `train` and `test`."""
    tiny_models.save_blip(folder / "blip")
    tiny_models.save_vit(folder / "vit")
    tiny_models.save_photos(folder / "train", 30)
    tiny_models.save_photos(folder / "test", 24)
    return folder


def recipe_in(world: Path, out: Path) -> Recipe:
    return Recipe(
        model=str(world / "blip"),
        sparsity=(0.5,),
        data=DataRecipe(str(world / "train"), batch_size=3, batches=2),
        out=str(out),
        device="cpu",
    )


def masks_of(folder: Path) -> Masks:
    (path,) = folder.glob("masks-*.safetensors")
    return Masks.load(path)
