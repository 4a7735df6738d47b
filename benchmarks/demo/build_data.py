"""Write the captioned scenes as image folders: `python -m benchmarks.demo.build_data DIR`.

Each split becomes a folder of PNG files with a `metadata.jsonl` of `file_name` and `text`, the
convention of `datasets`' ImageFolder, so that `vlp prune --data DIR/calibration` reads it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.demo.samples import Sample


def write_folder(sample: Sample, folder: Path) -> None:
    """Write one split.

    Args:
        sample: images and captions.
        folder: made if missing; must be empty.

    Raises:
        FileExistsError: if the folder already holds something.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; remove it or choose another folder")
    lines = []
    for index, (image, caption) in enumerate(zip(sample.images, sample.captions, strict=True)):
        name = f"{index:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(folder: Path, *, calibration: int, downstream: int, test: int) -> None:
    """Write the three splits below `folder`; a count of 0 leaves a split out."""
    from benchmarks.demo.samples import calibration_sample, downstream_sample, unseen_sample

    makers = {
        "calibration": (calibration_sample, calibration),
        "downstream": (downstream_sample, downstream),
        "test": (unseen_sample, test),
    }
    for name, (make, count) in makers.items():
        if count:
            write_folder(make(count), folder / name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", type=int, default=1000, help="pre-training handwriting")
    parser.add_argument("--downstream", type=int, default=2000, help="for fine-tuning")
    parser.add_argument("--test", type=int, default=1000, help="for retrieval and captioning")
    args = parser.parse_args()
    build(args.folder, calibration=args.calibration, downstream=args.downstream, test=args.test)


if __name__ == "__main__":
    main()
