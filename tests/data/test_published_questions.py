"""VQAv2 and NLVR2 in the layouts that people have on their disks."""

from __future__ import annotations

import json
from pathlib import Path

import published_layouts as layouts
import pytest
from captioned_files import encoded

from vlp_plugins.data.nlvr2 import open_nlvr2
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.records import Sample
from vlp_plugins.runtime.errors import DataError


def red(opener) -> int:
    return opener().convert("RGB").getpixel((0, 0))[0]


def shown(question: Sample) -> tuple[int, str, tuple[str, ...]]:
    return red(question.image), question.texts[0], question.answers


def test_vqa_as_published(tmp_path: Path) -> None:
    found = open_questions(str(layouts.vqa(tmp_path)), "val")
    assert [shown(item) for item in found.items] == [
        (n, f"what is {n}?", tuple(layouts.ten(f"a{n}"))) for n in range(3)
    ]
    assert found.items[1].place == "question 11"
    assert found.answers is None
    assert found.description == f"{tmp_path} (val)"


@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_the_test_set_has_no_answers(tmp_path: Path, split: str) -> None:
    (item,) = open_questions(str(layouts.vqa(tmp_path)), split).items
    assert shown(item) == (7, "why?", ())


def test_lists_of_blips_kind_with_the_answers_to_choose_among(tmp_path: Path) -> None:
    found = open_questions(str(layouts.blip_vqa(tmp_path)))
    assert [shown(item) for item in found.items] == [
        (n, f"what is {n}?", tuple(layouts.ten(f"a{n}"))) for n in range(2)
    ]
    assert found.answers == ("a0", "a1", "no")


def test_a_plain_folder(tmp_path: Path) -> None:
    rows = [
        {"file_name": "0.png", "question": "what?", "answer": "this"},
        {"file_name": "0.png", "question": "who?", "answers": ["he", "she"]},
    ]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(encoded(5))
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_questions(str(tmp_path), "test").items
    assert [shown(item) for item in found] == [(5, "what?", ("this",)), (5, "who?", ("he", "she"))]


def test_a_folder_of_something_else_says_what_was_expected_and_found(tmp_path: Path) -> None:
    (tmp_path / "cats.txt").write_text("")
    with pytest.raises(DataError, match=r"expected v2_OpenEnded_.*vqa_val\.json or metadata\.jsonl"
                       r", found cats\.txt"):  # fmt: skip
        open_questions(str(tmp_path))
    with pytest.raises(DataError, match="folder /nowhere does not exist"):
        open_questions("/nowhere")


def test_answers_that_are_missing_are_named(tmp_path: Path) -> None:
    layouts.vqa(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"annotations": content["annotations"][:2]}))
    with pytest.raises(DataError, match=r"1 questions of .* have no answers .* \(first: 12\)"):
        open_questions(str(tmp_path), "val")
    path.unlink()
    with pytest.raises(DataError, match=r"not its answers, v2_mscoco_val2014_annotations\.json"):
        open_questions(str(tmp_path), "val")


def test_a_list_of_answers_holds_texts(tmp_path: Path) -> None:
    layouts.blip_vqa(tmp_path)
    (tmp_path / "annotations" / "answer_list.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"answer_list\.json should hold a list of answers"):
        open_questions(str(tmp_path))


def test_nlvr2_as_published_and_listed(tmp_path: Path) -> None:
    layouts.nlvr2(tmp_path)
    found = open_nlvr2(tmp_path)
    assert [(s.texts[0], s.label, red(s.image), red(s.second)) for s in found] == [
        ("statement 0", False, 0, 1),
        ("statement 1", True, 2, 3),
    ]
    assert found[1].place == "dev-1-0-0"
    (train,) = open_nlvr2(tmp_path, "train")
    assert [red(image) for image in (train.image, train.second)] == [8, 9]
    (test,) = open_nlvr2(tmp_path, "test")
    assert (test.texts[0], test.label, red(test.image)) == ("t", True, 2)


def test_nlvr2_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'dev' of NLVR2: expected dev\.json"):
        open_nlvr2(tmp_path)
    layouts.nlvr2(tmp_path)
    (tmp_path / "data" / "dev.json").write_text('{"sentence": "s", "identifier": "dev-0-0-0"}')
    with pytest.raises(DataError, match="a row has no label"):
        open_nlvr2(tmp_path)
    (tmp_path / "data" / "dev.json").write_text("[1]")
    with pytest.raises(DataError, match="is not a JSON object"):
        open_nlvr2(tmp_path)


def test_one_metadata_file_for_several_splits(tmp_path: Path) -> None:
    rows = []
    for number, split in enumerate(("train", "test")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{number}.png").write_bytes(encoded(number))
        row = {"file_name": f"{split}/{number}.png", "question": f"of {split}?", "answer": "no"}
        rows.append(json.dumps(row))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    for split in (None, "train", "test"):
        found = open_questions(str(tmp_path), split)
        assert [item.texts[0] for item in found.items] == [f"of {split or 'train'}?"]
        assert found.description.endswith(f" ({split or 'train'})")
    with pytest.raises(DataError, match="no split 'val'"):
        open_questions(str(tmp_path), "val")


def test_a_metadata_file_for_each_split(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(encoded(number))
        row = {"file_name": "0.png", "question": f"of {split}?", "answer": "no"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    for split in (None, "train", "test"):
        found = open_questions(str(tmp_path), split)
        assert [item.texts[0] for item in found.items] == [f"of {split or 'train'}?"]
        assert found.description == f"{tmp_path} ({split or 'train'})"
