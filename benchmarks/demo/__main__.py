"""python -m benchmarks.demo: writes captioned scenes and compares methods on three trained models.

What it runs is `vlp compare`, as anyone runs it on a model and a folder of their own: BLIP and
X-VLM find captions and images, the chat model answers questions.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo import MODELS, SPARSITIES

METHODS = ("random", "omp", "lamp", "l2", "wanda", "multiflow", "alps")
FAMILIES = ("blip", "xvlm", "chat")


def command_of(model: Path, data: Path, test: Path, out: Path) -> list[str]:
    """The words of the command for one model; paths as one would write them from here."""
    here = Path.cwd()
    model, data, test, out = (
        path.relative_to(here) if path.is_relative_to(here) else path
        for path in (model, data, test, out)
    )
    return [
        *("vlp", "compare", str(model), "--data", str(data), "--test", str(test)),
        *(
            "--methods",
            *METHODS,
            "--sparsity",
            *map(str, SPARSITIES),
            "--device",
            "cpu",
            "--out",
            str(out),
        ),
    ]


def run(models: Path, out: Path, *, pairs: int, calibration: int) -> int:
    """Writes data below `out` and compares on each model; the exit code of the first that fails."""
    import torch

    from benchmarks.demo.build_data import build
    from vlp_plugins.cli import main as vlp

    for name, chat in (("data", False), ("chat-data", True)):
        build(out / name, calibration=calibration, downstream=0, test=pairs, chat=chat)
    # The models are small: more threads cost more than they bring, and may change a last digit.
    torch.set_num_threads(1)
    for family in FAMILIES:
        splits = ("calibration", "test")
        if family == "chat":
            data, test = (out / "chat-data" / f"{split}-questions" for split in splits)
        else:
            data, test = (out / "data" / split for split in splits)
        words = command_of(models / family, data, test, out / family)
        print(f"\n$ {shlex.join(words)}", flush=True)
        try:
            vlp(words[1:])
        except SystemExit as ended:
            if ended.code:
                return int(ended.code)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__)
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="new folder")
    parser.add_argument("--pairs", type=int, default=1000, help="unseen test pairs")
    parser.add_argument("--calibration", type=int, default=512, help="pairs")
    args = parser.parse_args(arguments)
    for family in FAMILIES:
        folder = args.models_dir / family
        if not (folder / "config.json").is_file():
            print(
                f"error: there is no trained model at {folder}; train one with `python -m "
                f"benchmarks.demo.train {family} --out {folder} --minutes 60`, or say with "
                "--models-dir where the models are",
                file=sys.stderr,
            )
            return 2
    if args.out.exists():
        print(f"error: {args.out} exists; remove it or give another --out", file=sys.stderr)
        return 2
    return run(args.models_dir.resolve(), args.out.resolve(), pairs=args.pairs,
               calibration=args.calibration)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
