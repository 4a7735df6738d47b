"""Write the downstream data: `python -m benchmarks.papers.downstream.build --out DIR`.

    DIR/scenes            retrieval, captioning, questions, in the layout of COCO and VQA
    DIR/digits            10 classes, in that of CIFAR-10       (DIR/digits-dev: development)
    DIR/coloured          70 classes, in that of CIFAR-100      (DIR/coloured-dev)
    DIR/framed            40 classes, in that of Flowers-102
    DIR/models/blip|xvlm  the demo models with the words of questions added

Same arguments, same files. `vlp_plugins.data` reads all of them as it reads the real ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from benchmarks.demo import MODELS
from benchmarks.demo.captions import DIGITS
from benchmarks.demo.processors import FAMILIES
from benchmarks.papers.downstream.class_files import write_cifar_10, write_cifar_100, write_flowers
from benchmarks.papers.downstream.classes import SETS
from benchmarks.papers.downstream.samples import draw_sample
from benchmarks.papers.downstream.scene_files import write_scenes
from benchmarks.papers.downstream.splits import SPLITS, Split
from benchmarks.papers.downstream.vocabulary import extend

PARTS = ("scenes", "digits", "coloured", "framed", "models")


def build(
    folder: Path,
    *,
    parts: tuple[str, ...] = PARTS,
    sizes: dict[Split, int] | None = None,
    seed: int = 0,
) -> None:
    """Writes what is asked for.

    Args:
        folder: made if missing.
        parts: of `PARTS`.
        sizes: images per split; None for the usual numbers.
        seed: of what training, development and test show.

    Raises:
        FileExistsError: if the folder already holds something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; remove it or choose another folder")
    counts: dict[Split, int | None] = {split: (sizes or {}).get(split) for split in SPLITS}
    if "scenes" in parts:
        for split in SPLITS:
            write_scenes(folder / "scenes", split, draw_sample(split, counts[split], seed))
    for name in SETS:
        if name in parts:
            _write_set(folder, name, counts, seed)
    if "models" in parts:
        for family in FAMILIES:
            extend(MODELS / family, folder / "models" / family)


def _write_set(folder: Path, name: str, counts: dict[Split, int | None], seed: int) -> None:
    train, dev, test = (SETS[name].draw(split, counts[split], seed) for split in SPLITS)
    if name == "framed":
        write_flowers(folder / name, train, dev, test)
    elif name == "coloured":
        write_cifar_100(folder / name, train, test, DIGITS)
        write_cifar_100(folder / f"{name}-dev", None, dev, DIGITS)
    else:
        write_cifar_10(folder / name, train, test)
        write_cifar_10(folder / f"{name}-dev", None, dev)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()
    build(args.out, parts=tuple(args.parts), seed=args.seed)


if __name__ == "__main__":
    main()
