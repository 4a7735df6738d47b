"""python -m benchmarks.parity DIR: ours beside the recorded outputs of the published code."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from benchmarks.results import add_record_options, recorded


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="one folder per model family, id and lvlm")
    add_record_options(parser)
    options = parser.parse_args()
    # After --help, which does not wait for torch.
    from benchmarks.parity.compare import compare_family, unknown_runs
    from benchmarks.parity.dimensions import compare_dimensions
    from benchmarks.parity.family import families
    from benchmarks.parity.layers import compare_layers
    from benchmarks.parity.lvlm import compare_lvlm

    found = families(options.folder)
    lines = []
    for family in found:
        if not (Path(__file__).parent / f"{family.name}.py").exists():
            continue  # recorded data of another kind
        for line in compare_family(family):
            lines.append(line)
            print(line, flush=True)
    for line in chain(
        compare_dimensions(options.folder),
        compare_layers(options.folder),
        compare_lvlm(options.folder),
    ):
        lines.append(line)
        print(line, flush=True)
    if not lines:
        print(
            f"{options.folder} has neither a family with a config.json nor id nor lvlm",
            file=sys.stderr,
        )
        return 2
    left_out = {run for family in found for run in unknown_runs(family)}
    if left_out:
        print(f"recorded, but no such method yet: {', '.join(sorted(left_out))}")
    outside = [line for line in lines if not line.ok]
    print(f"{len(lines)} comparisons, {len(outside)} outside the tolerances")
    print(recorded("parity", [asdict(line) for line in lines], options.out))
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
