"""A folder of images with metadata.jsonl or metadata.csv."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from captioned_files import CAPTIONS, encoded, picture, read, write_folder
from PIL import Image

from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.sources import open_source
from vlp_plugins.runtime.errors import DataError

EXPECTED = list(enumerate(CAPTIONS))


def test_pairs_come_in_the_order_of_the_metadata_as_often_as_asked(photos: Path) -> None:
    source = open_source(str(photos))
    assert source.length == 4
    assert read(source) == EXPECTED
    assert read(source) == EXPECTED
    assert source.skipped == 0


def test_the_metadata_file_itself_names_the_folder(photos: Path) -> None:
    assert read(open_source(str(photos / "metadata.jsonl"))) == EXPECTED


def test_csv_with_commas_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(7))
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.png,"one, and two"\n')
    assert read(open_source(str(tmp_path))) == [(7, "one, and two")]


def test_a_comma_outside_quotes_does_not_cut_the_caption_silently(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(7))
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,one, and two\n")
    with pytest.raises(DataError, match=r"metadata.csv, line 2: more fields .* double quotes"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("table", ["metadata.csv", "captions.csv"])
def test_the_only_table_next_to_images_is_their_metadata(tmp_path: Path, table: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(7))
    (tmp_path / table).write_text("image,caption\na.png,a red seven\n")
    for source in (tmp_path, tmp_path / table):
        assert read(open_source(str(source))) == [(7, "a red seven")]


@pytest.mark.parametrize("column", ["text", "caption", "Sentence", "captions"])
def test_the_usual_caption_columns_are_found(tmp_path: Path, column: str) -> None:
    folder = write_folder(tmp_path / "x", list(CAPTIONS), column=column)
    assert read(open_source(str(folder))) == EXPECTED


def test_an_unusual_caption_column_must_be_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", list(CAPTIONS), column="words")
    with pytest.raises(DataError, match=r"its columns: file_name, words\); name it with caption_c"):
        open_source(str(folder))
    assert read(open_source(str(folder), caption_column="words")) == EXPECTED
    with pytest.raises(DataError, match="no column 'word' .did you mean 'words'"):
        open_source(str(folder), caption_column="word")


def test_of_several_captions_the_first_or_all_are_taken(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", [["one", "uno"], ["two"]])
    assert read(open_source(str(folder))) == [(0, "one"), (1, "two")]
    every = open_source(str(folder), captions="all")
    assert read(every) == [(0, "one"), (0, "uno"), (1, "two")]
    assert every.length == 3


def test_images_alone_for_models_that_read_no_text(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    assert read(open_source(str(tmp_path), captions="none")) == [(1, ""), (2, "")]


@pytest.fixture
def splits(tmp_path: Path) -> str:
    for split, words in (("train", ["t0", "t1"]), ("test", ["e0"])):
        write_folder(tmp_path / "s" / split, list(words))
    return str(tmp_path / "s")


def test_splits_are_sub_folders_and_train_is_the_default(splits: str) -> None:
    assert read(open_source(splits)) == [(0, "t0"), (1, "t1")]
    assert read(open_source(splits, split="test")) == [(0, "e0")]
    with pytest.raises(DataError, match="no split 'tset' .did you mean 'test'"):
        open_source(splits, split="tset")


def test_splits_may_be_the_first_part_of_the_file_names(tmp_path: Path) -> None:
    rows = []
    for number, split in enumerate(("train", "val", "val")):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{number}.png").write_bytes(encoded(number))
        rows.append(json.dumps({"file_name": f"{split}/{number}.png", "text": split}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert read(open_source(str(tmp_path), split="val")) == [(1, "val"), (2, "val")]
    whole = open_source(str(tmp_path))
    assert read(whole) == [(0, "train")], "not the images to measure on"
    assert whole.description.endswith(" (train)")
    alone = open_source(str(tmp_path), captions="none")
    assert (read(alone), alone.description) == ([(0, "")], whole.description)
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(str(tmp_path), split="test")


def test_shuffling_is_a_permutation_that_the_seed_decides(
    numbered: Callable[[int], Path],
) -> None:
    source = open_source(str(numbered(30)))
    state = random.getstate()
    one, again, other = read(source, 1), read(source, 1), read(source, 2)
    assert random.getstate() == state
    assert one == again != other
    assert sorted(one) == sorted(other) == read(source)


def test_images_become_rgb_and_upright(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", ["grey", "turned"])
    Image.new("L", (6, 4), 9).save(folder / "000.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture(1).save(folder / "001.png", exif=exif)
    grey, turned = [image for image, _ in open_source(str(folder))]
    assert grey.getpixel((0, 0)) == (9, 9, 9)
    assert turned.size == (4, 6)


def damage(folder: Path, *numbers: int) -> None:
    for number in numbers:
        path = folder / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:40])


def test_up_to_5_percent_of_damaged_images_are_skipped_and_counted(
    numbered: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = numbered(40)
    damage(folder, 3, 20)
    source = open_source(str(folder))
    with caplog.at_level(logging.WARNING):
        pairs = read(source)
    assert [red for red, _ in pairs] == [n for n in range(40) if n not in (3, 20)]
    assert (source.seen, source.skipped) == (40, 2)
    assert "2 of 40 records read cannot be used (first: 003.png" in caplog.text


def test_more_damaged_images_are_an_error_as_soon_as_it_is_certain(
    numbered: Callable[[int], Path],
) -> None:
    folder = numbered(40)
    damage(folder, 3, 4, 5, 30)
    source = open_source(str(folder))
    with pytest.raises(DataError, match=r"at least 3 of 40 records .*003.png.* more than 5%"):
        read(source)
    assert source.seen == 6


def test_a_pair_without_words_is_skipped_too(tmp_path: Path) -> None:
    captions: list[object] = [f"no. {n}" for n in range(40)]
    captions[5], captions[6] = "  ", None
    source = open_source(str(write_folder(tmp_path / "x", captions)))
    assert len(read(source)) == 38
    assert source.skipped == 2


def test_captions_that_are_no_text_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its caption is 3, not text"):
        read(open_source(str(write_folder(tmp_path / "x", [3, 4]))))


def test_missing_images_are_named_and_counted(photos: Path) -> None:
    (photos / "001.png").unlink()
    (photos / "003.png").unlink()
    with pytest.raises(DataError, match=r"2 of 4 images that do not exist \(first: 001.png\)"):
        open_source(str(photos))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is empty; put images"),
        (lambda folder: (folder / "a.png").write_bytes(encoded(0)), r"no metadata.*1 images found"),
        (lambda folder: (folder / "metadata.jsonl").write_text("\n"), "has no rows"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{'a'"), "line 1: not JSON"),
        (lambda folder: (folder / "metadata.jsonl").write_text('"a"'), "line 1: .*not a JSON obj"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"text": "a"}'), "no column 'file"),
        (lambda folder: (folder / "metadata.csv").write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
        (
            lambda folder: [(folder / f"metadata.{k}").touch() for k in ("csv", "jsonl")],
            "remove one of them",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        open_source(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/photos", "data /nowhere/photos does not exist: check the path"),
        ("./photos/", "does not exist"),
        ("https://example.org/a.tar", "does not exist; download it first"),
        ("photos.parquet", "data photos.parquet does not exist: check the path$"),
        ("here/photo", r"check the path .did you mean here/photos\?.; it is not looked up on the"),
    ],
)
def test_a_source_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "here" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for opened in (open_source, open_labelled):
        with pytest.raises(DataError, match=message):
            opened(source)


def test_a_folder_is_read_without_the_package_datasets(photos: Path) -> None:
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from vlp_plugins.data.sources import open_source\n"
        "from vlp_plugins.runtime.errors import DataError\n"
        f"print(len(list(open_source({str(photos)!r}))))\n"
        "try: open_source('some/dataset')\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("4\n"), done.stderr
    assert "pip install vlp-plugins[data]" in done.stdout


def test_folders_in_file_names_that_are_no_splits_are_all_read(tmp_path: Path) -> None:
    rows = []
    for number, place in enumerate(("cats", "dogs")):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{number}.png").write_bytes(encoded(number))
        rows.append(json.dumps({"file_name": f"{place}/{number}.png", "text": place}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert len(read(open_source(str(tmp_path)))) == 2


def test_splits_without_train_are_asked_for(tmp_path: Path) -> None:
    rows = []
    for place in ("val", "test"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "0.png").write_bytes(encoded(0))
        rows.append(json.dumps({"file_name": f"{place}/0.png", "text": place}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match="has the splits val, test; name one with split"):
        open_source(str(tmp_path))
