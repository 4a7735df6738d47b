"""Comparisons on the demo models in cells: each keeps its figures in a file and is run once."""

from __future__ import annotations

import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.demo import MODELS
from benchmarks.demo.build_data import build
from benchmarks.demo.measure import Subject
from vlp_plugins.loading import batches
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import write_text

Content = dict[str, Any]
"""What the file of a cell holds; how many `seconds` it took is among it."""


@dataclass
class Bench:
    """A model and its data.

    Attributes:
        subject: the model.
        data: folder with the image folder `calibration`.
        settings: of the comparison, a dataclass: `samples` calibration pairs of each seed are drawn
            from `pool`, `pairs` unseen ones are measured with.
        out: folder of the cells.
    """

    subject: Subject
    data: Path
    settings: Any
    out: Path

    def batches(self, seed: int, size: int, samples: int | None = None) -> list[Batch]:
        """The calibration pairs of a seed, or the first ones of them."""
        count = min(self.settings.samples, samples or self.settings.samples) // size
        pairs = self.data / "calibration"
        return list(batches(pairs, self.subject.model, batch_size=size, count=count, seed=seed))


class KeptCell(ABC):
    """One run of a comparison; subclasses are dataclasses.

    Attributes:
        model: name of the demo model.
        way: what is compared, a dataclass.
    """

    model: str
    way: Any

    @abstractmethod
    def path(self, out: Path) -> Path:
        """Its file."""

    @abstractmethod
    def run(self, bench: Any) -> Content:
        """Does the work and keeps its file."""

    def record(self, settings: Any) -> Content:
        """What tells whether a file holds the same comparison."""
        return json.loads(json.dumps({"settings": asdict(settings), "way": asdict(self.way)}))

    def load(self, out: Path, settings: Any) -> Content | None:
        """The content of its file; None if there is none.

        Raises:
            OutputError: if it was made with other settings.
        """
        path = self.path(out)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        if any(found[key] != value for key, value in self.record(settings).items()):
            raise OutputError(
                f"{path} was made with other settings; move the folder away, or give another --out"
            )
        return found

    def keep(self, out: Path, content: Content) -> Content:
        """Writes its file whole or not at all, and returns the content."""
        write_text(self.path(out), json.dumps(content, indent=1) + "\n", overwrite=True)
        return content


CellT = TypeVar("CellT", bound=KeptCell)


def recorded_cells(cells: Sequence[CellT], out: Path) -> list[CellT]:
    """The cells that have a file; says how many others there are."""
    there = [cell for cell in cells if cell.path(out).exists()]
    if left := len(cells) - len(there):
        print(f"{left} cells are not recorded; --record runs them, --out FOLDER runs all there")
    return there


def run_cells(
    cells: Sequence[CellT],
    settings: Any,
    out: Path,
    make_bench: Callable[[Subject, Path, Any, Path], Bench],
    tell: Callable[[CellT, list[Content], list[CellT]], str],
    *,
    models: Path = MODELS,
    limit: float | None = None,
) -> list[Content]:
    """Runs the cells that have no file yet, and returns what all say that have one.

    Args:
        cells: what is asked for, in order.
        settings: of the comparison.
        out: folder of the cells' files.
        make_bench: class of the benches.
        tell: the line to print about a cell that is done, given all contents and what is left.
        models: folder of the demo models.
        limit: seconds after which no further cell is begun; None: no limit.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    known = [cell.load(out, settings) for cell in cells]
    todo = [cell for cell, content in zip(cells, known, strict=True) if content is None]
    done = [content for content in known if content is not None]
    print(f"{len(done)} of {len(cells)} cells are there", flush=True)
    benches: dict[str, Bench] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        if todo:
            build(data, calibration=settings.pool, downstream=0, test=settings.pairs)
        while todo and (limit is None or time.perf_counter() - begin < limit):
            cell = todo.pop(0)
            if cell.model not in benches:
                subject = Subject.load(models / cell.model, data)
                benches[cell.model] = make_bench(subject, data, settings, out)
            done.append(cell.run(benches[cell.model]))
            print(tell(cell, done, todo), flush=True)
    return done
