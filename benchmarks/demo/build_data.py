"""Write the captioned scenes as image folders: `python -m benchmarks.demo.build_data DIR`.

Each split becomes a folder of PNG files with a `metadata.jsonl` of `file_name` and `text`, the
convention of `datasets`' ImageFolder, so that `vlp prune --data DIR/calibration` reads it.

With `--chat` the scenes show one to four digits instead of two, as the chat model knows them, and
each split has a second folder, such as `test-questions`, with a question about every scene
(`file_name`, `question`, `answers`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.demo.samples import Sample

AGREEING = 4  # people who must give an answer for it to be fully right in VQA's accuracy


def write_folder(sample: Sample, folder: Path) -> None:
    """Write one split.

    Args:
        sample: images and captions.
        folder: made if missing; must be empty.

    Raises:
        FileExistsError: if the folder already holds something.
    """
    _write(sample.images, [{"text": caption} for caption in sample.captions], folder)


def write_questions(sample: Sample, folder: Path) -> None:
    """Write a question about every scene, the kinds in turn; see `write_folder`."""
    import numpy as np

    from benchmarks.demo.conversations import KINDS, ask

    rng = np.random.default_rng(0)
    rows = []
    for index, facts in enumerate(sample.facts):
        question = ask(KINDS[index % len(KINDS)], sorted(facts), rng)
        rows.append({"question": question.text, "answers": question.answers * AGREEING})
    _write(sample.images, rows, folder)


def _write(images: Tensor, rows: list[dict[str, Any]], folder: Path) -> None:
    """Images uint8 `[n, 3, h, w]`, and what is said about each."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; remove it or choose another folder")
    lines = []
    for index, (image, row) in enumerate(zip(images, rows, strict=True)):
        name = f"{index:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        lines.append(json.dumps({"file_name": name, **row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(
    folder: Path, *, calibration: int, downstream: int, test: int, chat: bool = False
) -> None:
    """Write the splits below `folder`; a count of 0 leaves a split out.

    Args:
        folder: of all splits.
        calibration: number of scenes.
        downstream: number of scenes.
        test: number of scenes.
        chat: scenes of one to four objects, and for each split a folder of questions.
    """
    from benchmarks.demo.samples import calibration_sample, downstream_sample, unseen_sample
    from benchmarks.demo.scenes import CHAT_OBJECTS, PAIRS

    makers = {
        "calibration": (calibration_sample, calibration),
        "downstream": (downstream_sample, downstream),
        "test": (unseen_sample, test),
    }
    objects = CHAT_OBJECTS if chat else PAIRS
    for name, (make, count) in makers.items():
        if count:
            sample = make(count, objects)
            write_folder(sample, folder / name)
            if chat:
                write_questions(sample, folder / f"{name}-questions")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", type=int, default=1000, help="pre-training handwriting")
    parser.add_argument("--downstream", type=int, default=2000, help="for fine-tuning")
    parser.add_argument("--test", type=int, default=1000, help="for retrieval and captioning")
    parser.add_argument("--chat", action="store_true", help="scenes for the chat model")
    args = parser.parse_args()
    build(
        args.folder,
        calibration=args.calibration,
        downstream=args.downstream,
        test=args.test,
        chat=args.chat,
    )


if __name__ == "__main__":
    main()
