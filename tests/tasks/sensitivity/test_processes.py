"""Two processes share the points and find what one finds."""

from __future__ import annotations

import json
from pathlib import Path

from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy
from two_processes import run_two_processes

from vlp_plugins.tasks.sensitivity.files import record_of
from vlp_plugins.tasks.sensitivity.measure import sensitivity

SCRIPT = """
import sys
from pathlib import Path
from torch import distributed
from test_processes import run, text_of
from vlp_plugins.runtime.distributed import before_joining

folder = Path(sys.argv[1])
before_joining()
distributed.init_process_group("gloo")
seen = []
found = run(folder / "work", lambda done, of: seen.append(of))
rank = distributed.get_rank()
(folder / f"found{rank}").write_text(text_of(found))
(folder / f"points{rank}").write_text(str(len(seen)))
again = run(folder / "work", lambda done, of: seen.append(of), resume=True)
assert again == found and len(seen) == seen[0], "nothing is measured twice"
distributed.barrier()  # gloo may abort a process whose peer is still at work
distributed.destroy_process_group()
"""


def run(folder: Path | None = None, progress=None, **options):
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return sensitivity(losing_toy(), toy_batches(2), adapter=LosingAdapter(), sparsity=[0.5, 0.8],
                       groups=["modality", "block"], method="omp", workplace=folder,
                       progress=progress, **options)  # fmt: skip


def text_of(found) -> str:
    points = [[record_of(point) for point in curve.points] for curve in found.curves]
    return json.dumps([record_of(found.dense), points])


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    run_two_processes(SCRIPT, tmp_path)
    expected = text_of(run())
    assert [(tmp_path / f"found{rank}").read_text() for rank in (0, 1)] == [expected] * 2
    assert [(tmp_path / f"points{rank}").read_text() for rank in (0, 1)] == ["8", "8"]
