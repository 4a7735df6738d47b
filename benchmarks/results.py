"""Where benchmarks record their figures: JSON with the machine they were measured on.

They print them, and write files of this repository only with `--record`. `tables` is made of its
files: it keeps that of each cell that was missing and is run, and the pages that it renders.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from vlp_plugins.runtime.files import write_text
from vlp_plugins.runtime.version import __version__

FOLDER = Path(__file__).parent / "results"
MADE_BY = f"vlp-plugins {__version__}"


def machine() -> dict[str, Any]:
    """What figures depend on beside the program."""
    import torch  # for commands whose help does without

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def add_record_options(
    parser: argparse.ArgumentParser, elsewhere: str = "--out", path: Path | None = None
) -> None:
    """Adds `--record` and the option of another path; both set `out`, None without either.

    Args:
        parser: of the benchmark.
        elsewhere: name of the option.
        path: where figures are recorded; None: `FOLDER`.
    """
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--record",
        dest="out",
        action="store_const",
        const=path or FOLDER,
        help="write the figures where the repository keeps them, in benchmarks/results",
    )
    where.add_argument(elsewhere, dest="out", type=Path, help="write them here instead")


def recorded(name: str, figures: Any, folder: Path | None) -> str:
    """Writes `figures` as `write_results` does, unless `folder` is None; says where, in a line."""
    if folder is None:
        return f"not recorded; --record writes benchmarks/results/{name}.json"
    return str(write_results(name, figures, folder))


def write_results(name: str, figures: Any, folder: Path) -> Path:
    """Writes `figures` to `<folder>/<name>.json` and returns the path."""
    record = {
        "benchmark": name,
        "made_by": MADE_BY,
        "machine": machine(),
        "figures": figures,
    }
    path = folder / f"{name}.json"
    write_text(path, json.dumps(record, indent=1) + "\n", overwrite=True)
    return path
