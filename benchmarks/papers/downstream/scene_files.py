"""Scenes on disk as COCO lies on many disks: the lists of BLIP's kind, and folders of images.

    coco_karpathy_train.json  ..._val.json  ..._test.json     captions
    vqa_train.json  vqa_val.json  vqa_test.json               questions and ten answers each
    answer_list.json                                          everything that may be answered
    train/000000000001.png  ...  val/  test/                  images

Every folder of images has a `metadata.jsonl` with the captions, so that it also is an image folder
of its own, and with the objects that the scene shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.demo.language import Fact
from benchmarks.papers.downstream.questions import ANSWERS
from benchmarks.papers.downstream.samples import Sample
from benchmarks.papers.downstream.splits import Split
from benchmarks.papers.downstream.wording import CELLS

FOLDERS: dict[Split, str] = {"train": "train", "dev": "val", "test": "test"}
_FIRST: dict[Split, int] = {"train": 1, "dev": 500_001, "test": 700_001}  # numbers of images


def write_scenes(folder: Path, split: Split, sample: Sample) -> None:
    """Writes one split; the answer list with any of them.

    Args:
        folder: of the data set.
        split: its name.
        sample: its scenes.

    Raises:
        FileExistsError: if the split is there already.
    """
    name = FOLDERS[split]
    place = folder / name
    place.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for index in range(len(sample)):
        number = _FIRST[split] + index
        file = f"{number:012}.png"
        Image.fromarray(sample.images[index].permute(1, 2, 0).numpy()).save(place / file)
        said = list(sample.captions[index])
        rows.append({"file_name": file, "text": said, "objects": _named(sample.facts[index])})
        image = f"{name}/{file}"
        if split == "train":  # the published list has a row per caption there
            captions += [{"image": image, "caption": c, "image_id": f"coco_{number}"} for c in said]
        else:
            captions.append({"image": image, "caption": said})
        for turn, question in enumerate(sample.questions[index]):
            questions.append(
                {
                    "question_id": 10 * number + turn,
                    "question": question.text,
                    "answer": list(question.answers),
                    "image": image,
                    "dataset": "vqa",
                    "question_type": question.kind,
                }
            )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "metadata.jsonl").write_text(lines, encoding="utf-8")
    _write(folder / f"coco_karpathy_{name}.json", captions)
    _write(folder / f"vqa_{name}.json", questions)
    _write(folder / "answer_list.json", list(ANSWERS))


def _named(facts: frozenset[Fact]) -> list[list[str]]:
    return [
        [COLOURS[colour][0], DIGITS[digit], CELLS[cell][0]] for colour, digit, cell in sorted(facts)
    ]


def facts_of(objects: list[list[str]]) -> frozenset[Fact]:
    """What `objects` of a line of `metadata.jsonl` says."""
    colours, cells = ([names[0] for names in each] for each in (COLOURS, CELLS))
    return frozenset(
        Fact(colours.index(colour), DIGITS.index(digit), cells.index(cell))
        for colour, digit, cell in objects
    )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
