"""python -m benchmarks.demo: prunes the two trained demo models and shows what was lost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.demo.run import Settings, run
from vlp_plugins.runtime.errors import VlpError


def main() -> int:
    standard = Settings()
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__)
    parser.add_argument("--models-dir", type=Path, default=standard.models)
    parser.add_argument("--out", type=Path, default=standard.out)
    parser.add_argument("--pairs", type=int, default=standard.pairs, help="unseen test pairs")
    parser.add_argument("--calibration", type=int, default=standard.calibration, help="pairs")
    args = parser.parse_args()
    logging.disable_progress_bar()  # one for every model that is loaded
    # The models are small: more threads than that cost more than they bring.
    torch.set_num_threads(min(2, torch.get_num_threads()))
    settings = Settings(args.models_dir, args.out, args.pairs, args.calibration)
    try:
        report = run(settings, tell=lambda line: print(line, flush=True))
    except VlpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
