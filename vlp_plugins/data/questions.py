"""Questions about images: VQAv2 as published and as BLIP and X-VLM list it, and plain folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from vlp_plugins.data.annotations import (
    Text,
    contents,
    find_file,
    image_of,
    image_root,
    matching_files,
    need_keys,
    read_json,
    read_rows,
)
from vlp_plugins.data.conversations import CHOICES, choices_in, chosen
from vlp_plugins.data.folder import file_column, find_split, read_metadata, rows_of_split
from vlp_plugins.data.records import Sample, Samples, choose_split, with_split
from vlp_plugins.runtime.errors import DataError, nearest_path

_QUESTIONS = re.compile(
    r".*OpenEnded_mscoco_(\w+?(?=2014_)|test(?:-dev)?(?=2015_))\d+_questions\.json"
)
_LIST = re.compile(r"vqa_(train|val|test)\.json")
_BELOW = ("images", "coco", "vg", "Images")


def open_questions(source: str, split: str | None = None) -> Samples:
    """Opens a folder of questions.

    - VQA as published: `v2_OpenEnded_mscoco_val2014_questions.json`,
      `v2_mscoco_val2014_annotations.json`, images `val2014/COCO_val2014_000000000001.jpg`;
    - lists of BLIP's kind: `vqa_val.json`, perhaps `answer_list.json`;
    - images with `metadata.jsonl`: `file_name`, `question`, and `answer` or `answers`; perhaps
      `choices`, a list of texts that the answer is one of.

    Files of annotations may be in `annotations`.

    Raises:
        DataError: if it is none of these, or files are missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"folder {source} does not exist; check the path{nearest_path(folder)}")
    readers: tuple[tuple[re.Pattern[str], Callable[[Path], list[_Row]]], ...] = (
        (_QUESTIONS, partial(_read_published, folder)),
        (_LIST, _read_list),
    )
    for pattern, read in readers:
        files: dict[str, Path] = {}
        for match, path in matching_files(folder, pattern):
            files.setdefault(match[1], path)
        if files:
            chosen = choose_split(list(files), split, where=source)
            rows = read(files[chosen])
            items = _questions(rows, folder, _BELOW, files[chosen])
            return Samples(f"{folder} ({chosen})", items, answers=_answer_list(folder))
    found = find_split(folder, split)
    if found is None:
        raise DataError(
            f"{folder} holds no questions: expected v2_OpenEnded_mscoco_val2014_questions.json, "
            f"vqa_val.json or metadata.jsonl, found {contents(folder)}"
        )
    path, prefix = found
    rows, part = _read_metadata(path, prefix, folder)
    items = _questions(rows, path.parent, (), path)
    return Samples(with_split(folder, part), items, answers=_answer_list(folder))


def holds_questions(folder: Path) -> bool:
    """True for a folder of VQA as published, or with lists of BLIP's kind."""
    return any(matching_files(folder, pattern) for pattern in (_QUESTIONS, _LIST))


class _Answer(TypedDict):
    answer: Text


_PUBLISHED = {"question_id": int | str, "image_id": int, "question": Text}
_ANSWERED = {"question_id": int | str, "answers": list[_Answer]}


class _Row(NamedTuple):
    place: str
    image: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def _questions(
    rows: list[_Row], folder: Path, below: Sequence[str], path: Path
) -> tuple[Sample, ...]:
    root = image_root(folder, [row.image for row in rows], below, path)
    return tuple(
        Sample(r.place, image_of(root / r.image), (r.text,), r.answers, choices=r.choices)
        for r in rows
    )


def _read_published(folder: Path, path: Path) -> list[_Row]:
    subset = path.name.removesuffix("_questions.json").rsplit("_", 1)[-1]  # val2014, test-dev2015
    answers = _published_answers(folder, path, subset)
    images = subset.replace("-dev", "")
    rows, lacking = [], []
    for row in read_rows(path, "questions"):
        number, image, text = need_keys(row, _PUBLISHED, path)
        name = f"{images}/COCO_{images}_{image:012}.jpg"
        if answers and number not in answers:
            lacking.append(number)
        rows.append(_Row(f"question {number}", name, str(text), answers.get(number, ())))
    if lacking:
        raise DataError(
            f"{len(lacking):,} questions of {path} have no answers in the annotations (first: "
            f"{lacking[0]}); fetch the annotations of {subset}"
        )
    return rows


def _published_answers(folder: Path, path: Path, subset: str) -> dict[Any, tuple[str, ...]]:
    """The answers by number of the question; none of a test set, whose are not published."""
    beginning = path.name.split("OpenEnded_", 1)[0]  # v2_
    name = f"{beginning}mscoco_{subset}_annotations.json"
    source = find_file(folder, name)
    if source is None:
        if subset.startswith("test"):
            return {}
        raise DataError(f"{path.name} is there, but not its answers, {name}; put it there as well")
    found = {}
    for row in read_rows(source, "annotations"):
        number, answers = need_keys(row, _ANSWERED, source)
        found[number] = tuple(str(answer["answer"]) for answer in answers)
    return found


def _read_list(path: Path) -> list[_Row]:
    rows = []
    for number, row in enumerate(read_rows(path)):
        image, text = need_keys(row, {"image": str, "question": Text}, path)
        place = f"question {row.get('question_id', number)}"
        rows.append(_Row(place, image, str(text), *_answers_in(row, path)))
    return rows


def _read_metadata(path: Path, split: str | None, folder: Path) -> tuple[list[_Row], str | None]:
    found = read_metadata(path)
    image = file_column(found[0])
    for row in found:
        need_keys(row, {image: str, "question": Text}, path)
    found, chosen = rows_of_split(found, image, split, path, folder)
    return [
        _Row(f"{path.name}, row {n}", str(r[image]), str(r["question"]), *_answers_in(r, path))
        for n, r in enumerate(found, 1)
    ], chosen


def _answers_in(row: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The answers, and what they are chosen from."""
    choices = choices_in(row.get(CHOICES))
    said = row.get("answers", row.get("answer"))
    if choices and isinstance(said, int):  # its number
        said = str(said)
    (said,) = need_keys({"answers": said}, {"answers": str | list[Text] | None}, path)
    several = [said] if isinstance(said, str) else said or ()
    return tuple(chosen(str(answer), choices) for answer in several), choices


def _answer_list(folder: Path) -> tuple[str, ...] | None:
    path = find_file(folder, "answer_list.json")
    if path is None:
        return None
    found = read_json(path)
    if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
        raise DataError(f"{path} should hold a list of answers, each a text")
    return tuple(found)
