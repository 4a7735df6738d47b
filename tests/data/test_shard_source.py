"""WebDataset tar shards."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from captioned_files import encoded, read

from vlp_plugins.data.records import buffered
from vlp_plugins.data.shards import expand_braces
from vlp_plugins.data.sources import open_source
from vlp_plugins.runtime.errors import DataError


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))
    return path


def pairs(numbers: range) -> dict[str, bytes]:
    files = {}
    for number in numbers:
        files[f"{number:04}.png"] = encoded(number)
        files[f"{number:04}.txt"] = f"no. {number}\n".encode()
    return files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of three pairs."""
    for shard in range(4):
        write_shard(tmp_path / f"s-{shard:03}.tar", pairs(range(3 * shard, 3 * shard + 3)))
    return tmp_path


EXPECTED = [(number, f"no. {number}") for number in range(12)]


@pytest.mark.parametrize(
    "written", ["", "/s-{000..003}.tar", "/s-*.tar", "/s-{000,001,002,003}.tar"]
)
def test_shards_are_written_as_a_folder_a_range_a_pattern_or_a_list(
    shards: Path, written: str
) -> None:
    source = open_source(f"{shards}{written}")
    assert source.length is None
    assert read(source) == EXPECTED
    assert read(source) == EXPECTED


def test_one_shard(shards: Path) -> None:
    assert read(open_source(str(shards / "s-001.tar"))) == EXPECTED[3:6]


def test_braces() -> None:
    assert expand_braces("a") == ["a"]
    assert expand_braces("a{08..10}") == ["a08", "a09", "a10"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    with pytest.raises(DataError, match="empty"):
        expand_braces("{3..1}")


def test_json_captions_and_jpeg_images_in_a_compressed_shard(tmp_path: Path) -> None:
    files = {
        "a/1.jpg": encoded(3, "JPEG"),
        "a/1.json": json.dumps({"caption": "three", "id": 5}).encode(),
        "a/.hidden": b"",
    }
    source = str(write_shard(tmp_path / "x.tgz", files))
    assert [text for _, text in open_source(source)] == ["three"]
    with pytest.raises(DataError, match=r"no column 'capton' \(did you mean 'caption'"):
        open_source(source, caption_column="capton")


def test_splits_are_sub_folders_or_beginnings_of_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "train" / "0.tar", pairs(range(2)))
    write_shard(tmp_path / "a" / "val" / "0.tar", pairs(range(5, 6)))
    assert read(open_source(str(tmp_path / "a"))) == EXPECTED[:2]
    assert read(open_source(str(tmp_path / "a"), split="val")) == EXPECTED[5:6]
    write_shard(tmp_path / "b" / "train-0.tar", pairs(range(2)))
    write_shard(tmp_path / "b" / "test-0.tar", pairs(range(7, 8)))
    assert read(open_source(str(tmp_path / "b"), split="test")) == EXPECTED[7:8]
    with pytest.raises(DataError, match="no .tar shards of split 'dev'"):
        open_source(str(tmp_path / "b"), split="dev")


def test_shuffling_mixes_across_shards_and_the_seed_decides(shards: Path) -> None:
    source = open_source(str(shards))
    one = read(source, 1)
    assert one == read(source, 1) != read(source, 2)
    assert sorted(one) == EXPECTED


def test_a_buffer_smaller_than_the_stream_loses_nothing() -> None:
    mixed = list(buffered(range(100), seed=3, size=10))
    assert mixed != list(range(100))
    assert sorted(mixed) == list(range(100))
    assert min(mixed[90:]) > 0
    assert max(mixed[:10]) < 20  # nothing can leave the buffer before it came in


def test_records_without_image_or_caption_are_skipped_and_counted(tmp_path: Path) -> None:
    files = pairs(range(60))
    del files["0010.png"]
    del files["0020.txt"]
    files["0030.png"] = files["0030.png"][:30]
    source = open_source(str(write_shard(tmp_path / "x.tar", files)))
    assert [red for red, _ in read(source)] == [n for n in range(60) if n not in (10, 20, 30)]
    assert source.skipped == 3


def test_a_stream_of_damaged_images_ends_in_an_error(tmp_path: Path) -> None:
    files = pairs(range(20))
    for number in range(2, 20, 2):
        files[f"{number:04}.png"] = b"no image"
    with pytest.raises(DataError, match="9 of 20 records .*x.tar/0002: cannot identify"):
        read(open_source(str(write_shard(tmp_path / "x.tar", files))))


def test_missing_shards_are_counted(shards: Path) -> None:
    (shards / "s-002.tar").unlink()
    with pytest.raises(DataError, match="1 of 4 shards do not exist .*s-002.tar"):
        open_source(f"{shards}/s-{{000..003}}.tar")
    with pytest.raises(DataError, match="no .tar shards at"):
        open_source(f"{shards}/t-*.tar")


def test_a_truncated_shard_is_named(shards: Path) -> None:
    damaged = shards / "s-002.tar"
    damaged.write_bytes(damaged.read_bytes()[:700])
    with pytest.raises(DataError, match="s-002.tar is damaged"):
        read(open_source(str(shards)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "hold no records"),
        ({"1.txt": b"one"}, "no image column that we know .its columns: txt"),
        ({"1.png": encoded(1)}, "no caption column that we know .its columns: png"),
        ({"1.png": encoded(1), "1.json": b'{"id": 3}'}, "no caption column .*its columns: id"),
        ({"1.png": encoded(1), "1.json": b"{"}, "not JSON"),
    ],
)
def test_shards_that_cannot_be_used_say_why(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    path = write_shard(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=message):
        open_source(str(path))


def test_two_pairs_of_one_name_are_refused_instead_of_one_hiding_the_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(2):
            for name, content in (("a.png", encoded(number)), ("a.txt", b"same name")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
    with pytest.raises(DataError, match=r"holds a\.png twice in one record"):
        read(open_source(str(path)))


def test_shards_of_several_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for split, numbers in (("train", range(2)), ("test", range(2, 3))):
        write_shard(tmp_path / f"{split}-000.tar", pairs(numbers))
    whole = open_source(str(tmp_path))
    assert read(whole) == EXPECTED[:2]
    assert whole.description.endswith(" (train)")
    assert read(open_source(str(tmp_path), split="test")) == EXPECTED[2:3]
