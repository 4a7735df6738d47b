"""What the package `datasets` reads. The only test file that imports it: that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from captioned_files import CAPTIONS, encoded, picture, read

from vlp_plugins.data.hub import DatasetSource
from vlp_plugins.data.sources import open_source
from vlp_plugins.runtime.errors import DataError

datasets = pytest.importorskip("datasets")

EXPECTED = list(enumerate(CAPTIONS))


def made(captions: list[Any], *, image: str = "image", caption: str = "caption") -> Any:
    columns = {
        image: [picture(n) for n in range(len(captions))],
        caption: captions,
        "number": list(range(len(captions))),
    }
    return datasets.Dataset.from_dict(columns).cast_column(image, datasets.Image())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("d") / "saved"
    made(CAPTIONS).save_to_disk(str(path))
    return path


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("d") / "parquet"
    path.mkdir()
    made(CAPTIONS).to_parquet(str(path / "train-0.parquet"))
    made(["one more"]).to_parquet(str(path / "test-0.parquet"))
    return path


def test_a_dataset_saved_to_disk(saved: Path) -> None:
    source = open_source(str(saved))
    assert source.length == 4
    assert read(source) == EXPECTED
    assert read(source) == EXPECTED
    files = sorted(saved.iterdir())
    one = read(source, 1)
    assert one == read(source, 1)
    assert sorted(one) == EXPECTED
    assert sorted(saved.iterdir()) == files  # shuffling leaves nothing behind
    with pytest.raises(DataError, match="has no splits; leave split 'test' out"):
        open_source(str(saved), split="test")


def test_splits_saved_to_disk(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=made(CAPTIONS), test=made(["one more"]))
    both.save_to_disk(str(tmp_path / "x"))
    assert read(open_source(str(tmp_path / "x"))) == EXPECTED
    assert read(open_source(str(tmp_path / "x"), split="test")) == [(0, "one more")]
    assert open_source(str(tmp_path / "x")).description.endswith(" (train)")
    with pytest.raises(DataError, match="no split 'dev' .known: test, train"):
        open_source(str(tmp_path / "x"), split="dev")


def test_images_that_a_table_names_are_relative_to_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(7))
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("image,caption\na.png,a red seven\n")
    assert read(open_source(str(tmp_path / "two.csv"))) == [(7, "a red seven")]


def test_a_folder_or_file_of_parquet_is_streamed(parquet: Path) -> None:
    source = open_source(str(parquet))
    assert source.length is None
    assert read(source) == EXPECTED
    assert sorted(read(source, 3)) == EXPECTED
    assert read(open_source(str(parquet), split="test")) == [(0, "one more")]
    assert read(open_source(str(parquet / "test-0.parquet"))) == [(0, "one more")]


def test_the_image_column_is_known_by_its_type_and_the_caption_by_its_name(tmp_path: Path) -> None:
    made(CAPTIONS, image="scan", caption="words").save_to_disk(str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"no caption column .*\(its columns: scan, words, number"):
        open_source(str(tmp_path / "x"))
    assert read(open_source(str(tmp_path / "x"), caption_column="words")) == EXPECTED


def test_several_captions() -> None:
    captions = [["one", "uno"], ["two"]]
    assert read(DatasetSource(made(captions), "x")) == [(0, "one"), (1, "two")]
    every = DatasetSource(made(captions), "x", captions="all")
    assert read(every) == [(0, "one"), (0, "uno"), (1, "two")]
    raw = [{"raw": "one", "id": 1}, {"raw": "two", "id": 2}]
    assert read(DatasetSource(made(raw), "x")) == [(0, "one"), (1, "two")]


def test_a_damaged_image_does_not_end_the_iteration() -> None:
    images = [encoded(n) for n in range(40)]
    images[7] = images[7][:40]
    columns = {"image": images, "text": [f"no. {n}" for n in range(40)]}
    source = DatasetSource(datasets.Dataset.from_dict(columns), "x")
    assert [red for red, _ in read(source)] == [n for n in range(40) if n != 7]
    assert source.skipped == 1


def test_without_captions_for_models_of_images_only() -> None:
    only = made(CAPTIONS).remove_columns("caption")
    assert read(DatasetSource(only, "x", captions="none")) == [(n, "") for n in range(4)]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    def rows() -> Any:
        yield {"image": picture(0), "text": "one"}
        raise RuntimeError("the line is cut")

    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    with pytest.raises(DataError, match="x broke off after 1 records: RuntimeError: the line is"):
        read(DatasetSource(stream, "x"))


def test_an_id_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot load dataset nobody/nothing") as raised:
        open_source("nobody/nothing")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="no folder photoz here, and as a hub id: cannot load"):
        open_source("photoz")


def test_a_damaged_saved_dataset(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot load dataset"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("named", ["{above}/secret.png", "https://example.org/secret.png"])
def test_rows_name_no_file_outside_of_their_folder(tmp_path: Path, monkeypatch, named: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(9))
    rows = {"image": [named.format(above=tmp_path)], "caption": ["words"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "train.parquet"))
    with pytest.raises(DataError, match="outside of .* VLP_READ_OUTSIDE=1|download its images"):
        read(open_source(str(folder)))
    if named.startswith("{above}"):
        monkeypatch.setenv("VLP_READ_OUTSIDE", "1")
        assert read(open_source(str(folder))) == [(9, "words")]


def test_rows_name_files_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(9))
    rows = {"image": [str(tmp_path / "a.png")], "caption": ["words"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
    assert read(open_source(str(tmp_path))) == [(9, "words")]


def test_a_saved_dataset_names_no_data_of_other_folders(saved: Path, tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": f"../{saved.name}/data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"state.json names .*, which is outside of"):
        open_source(str(tmp_path))


def test_a_dataset_decodes_nothing_but_pictures() -> None:
    rows = [{"bytes": encoded(number, "EPS"), "path": "a.png"} for number in range(2)]
    found = datasets.Dataset.from_dict({"image": rows, "caption": ["a", "b"]})
    source = DatasetSource(found.cast_column("image", datasets.Image(decode=False)), "made")
    with pytest.raises(DataError, match="record 1: cannot identify image file"):
        read(source)
