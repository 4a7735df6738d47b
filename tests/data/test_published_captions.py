"""COCO and Flickr30k with captions, in the layouts that people have on their disks."""

from __future__ import annotations

import json
from pathlib import Path

import published_layouts as layouts
import pytest
from captioned_files import read

from vlp_plugins.data.sources import open_source
from vlp_plugins.runtime.errors import DataError


@pytest.mark.parametrize("layout", [layouts.karpathy_coco, layouts.blip_coco])
def test_coco_by_split_with_all_captions(tmp_path: Path, layout) -> None:
    layout(tmp_path)
    first = open_source(str(tmp_path), split="test")
    assert read(first) == [(3, layouts.said(3)[0]), (4, layouts.said(4)[0])]
    every = open_source(str(tmp_path), split="test", captions="all")
    assert read(every) == [(n, text) for n in (3, 4) for text in layouts.said(n)]
    assert (first.length, every.length) == (2, 10)
    assert read(open_source(str(tmp_path), split="val", captions="all")) == [
        (2, text) for text in layouts.said(2)
    ]


def test_restval_belongs_to_train_which_is_taken_without_a_wish(tmp_path: Path) -> None:
    source = open_source(str(layouts.karpathy_coco(tmp_path)))
    assert [red for red, _ in read(source)] == [0, 1]
    assert source.description == f"{tmp_path} (train)"
    assert sorted(read(source, seed=1)) == read(source)


def test_rows_of_the_same_image_are_one_image(tmp_path: Path) -> None:
    layouts.blip_coco(tmp_path)
    assert open_source(str(tmp_path), split="train").length == 1
    source = open_source(str(tmp_path), split="train", captions="all")
    assert read(source) == [(0, text) for text in layouts.said(0)]


@pytest.mark.parametrize("layout", [layouts.karpathy_flickr, layouts.blip_flickr])
def test_flickr30k(tmp_path: Path, layout) -> None:
    found = read(open_source(str(layout(tmp_path)), split="test", captions="all"))
    images = [1, 2] if layout is layouts.karpathy_flickr else [0, 1]
    assert found == [(n, text) for n in images for text in layouts.said(n)]


def test_an_unknown_split_says_which_there_are(tmp_path: Path) -> None:
    layouts.karpathy_coco(tmp_path)
    with pytest.raises(DataError, match=r"no split 'tset' \(did you mean 'test'\?\)"):
        open_source(str(tmp_path), split="tset")


def test_images_that_are_elsewhere_say_where_they_were_looked_for(tmp_path: Path) -> None:
    layouts.karpathy_coco(tmp_path)
    (tmp_path / "val2014").rename(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"val2014/COCO_val2014_.*3\.jpg, which is in none of"):
        open_source(str(tmp_path), split="test")


def test_missing_images_are_counted(tmp_path: Path) -> None:
    layouts.karpathy_coco(tmp_path)
    (tmp_path / "val2014" / layouts.coco_name(4, "val2014")).unlink()
    with pytest.raises(DataError, match=r"names 1 of 2 images that are not in .*fetch them again"):
        open_source(str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "dataset_coco.json is not JSON"),
        ("[1, 2]", 'should hold an object with a list "images" of objects; it is a list'),
        ('{"pictures": []}', "it is an object with pictures"),
        ('{"images": [{"filename": "a.jpg", "split": "test"}]}', "a row has no sentences"),
        (
            '{"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"tokens": []}]}]}',
            'image a.jpg has no sentences with "raw" text',
        ),
    ],
)
def test_a_file_of_another_kind_says_what_was_expected(tmp_path, content, message) -> None:
    (tmp_path / "dataset_coco.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path), split="test")


def test_a_list_without_captions_needs_references(tmp_path: Path) -> None:
    layouts.blip_coco(tmp_path)
    path = tmp_path / "annotations" / "coco_karpathy_val_gt.json"
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(DataError, match='should hold an object with a list "annotations"'):
        open_source(str(tmp_path), split="val")
    path.unlink()
    with pytest.raises(DataError, match="no caption, and none is in coco_karpathy_val_gt.json"):
        open_source(str(tmp_path), split="val")


def test_lists_of_two_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    layouts.blip_coco(tmp_path)
    (tmp_path / "flickr30k_test.json").write_text("[]")
    with pytest.raises(DataError, match="two data sets, flickr30k_test.json and coco_kar"):
        open_source(str(tmp_path), split="test")
