"""Reads thousands of damaged files as a user would: `python tests/damaged --files 10000`.

Each ends well or with one sentence. Anything else is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from run import Tally, read_files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/damaged", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="how many, of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="other damage")
    parser.add_argument(
        "--only", metavar="KIND", default="", help="files of one kind, by a part of its name"
    )
    parser.add_argument("--number", type=int, help="one file of that kind, with the traceback")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep that file in a new folder"
    )
    given = parser.parse_args()
    print(f"{'kind':34}{'files':>7}{'read':>7}{'refused':>9}{'unexpected':>12}{'slowest':>9}")
    with tempfile.TemporaryDirectory(prefix="damaged-") as folder:
        found = read_files(
            Path(folder),
            given.files,
            seed=given.seed,
            only=given.only,
            number=given.number,
            keep=given.keep,
            done=print_row,
        )
    print_row("all", Tally.of(found.values()))
    return any(tally.unexpected for tally in found.values())


def print_row(name: str, tally: Tally) -> None:
    print(
        f"{name:34}{tally.files:7,}{tally.read:7,}{tally.refused:9,}"
        f"{len(tally.unexpected):12,}{tally.slowest:8.1f}s",
        flush=True,
    )
    if name != "all":
        for each in tally.unexpected:
            print(f"  {each}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
