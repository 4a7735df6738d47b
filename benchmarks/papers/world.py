"""Where the models and the data of the tables are; made once, the same for everybody."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo.build_data import build as build_pretraining
from benchmarks.papers.downstream.build import build as build_downstream
from benchmarks.papers.downstream.vit import MODEL as VIT
from vlp_plugins.runtime.files import atomic_folder

POOL = 3072
"""Pairs of pre-training data to calibrate with; every seed draws its own from them."""
VERSION = 1
"""Of everything that cells depend on and their settings do not name: models, data, defaults of
methods and compositions. To be raised when one changes; cells of another version are refused."""


@dataclass(frozen=True)
class World:
    """A folder with everything that cells read, and the masks that they share.

    Attributes:
        folder: kept from run to run; it may be deleted, and is made again.
        device: of the models; None takes a GPU if there is one.
        memory_budget: of gradients; None: what is free.
    """

    folder: Path
    device: str | None = "cpu"
    memory_budget: str | None = "4GiB"

    small = True
    """Whether models and data are those of this repository."""

    @property
    def downstream(self) -> Path:
        """What `benchmarks.papers.downstream.build` writes."""
        return self.folder / f"downstream-{VERSION}"

    @property
    def calibration(self) -> str:
        """An image folder of pre-training pairs."""
        return str(self.folder / f"pretraining-{VERSION}" / "calibration")

    @property
    def masks(self) -> Path:
        """Masks that the cells of several tasks share."""
        return self.folder / f"masks-{VERSION}"

    def model(self, name: str) -> str:
        """The pre-training model of a family."""
        return str(VIT if name == "vit" else self.downstream / "models" / name)

    def calibration_of(self, model: str) -> str:
        """What a family is calibrated with; the small ViT draws its images instead."""
        return self.calibration

    def task_data(self, data: str) -> str:
        """A downstream data set, by the name that `Tuning` gives it."""
        return str(self.downstream / data)

    def make(self) -> None:
        """Makes what is not there yet."""
        self.masks.mkdir(parents=True, exist_ok=True)
        if not self.downstream.exists():
            with atomic_folder(Path(os.path.abspath(self.downstream))) as target:  # noqa: PTH100
                build_downstream(target)
        if not Path(self.calibration).exists():
            whole = Path(self.calibration).parent
            with atomic_folder(Path(os.path.abspath(whole))) as target:  # noqa: PTH100
                build_pretraining(target, calibration=POOL, downstream=0, test=0)
