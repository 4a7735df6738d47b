"""Image files of unknown origin: which are decoded, how large they may be, and where they lie."""

from __future__ import annotations

import json
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from captioned_files import CAPTIONS, encoded, read
from PIL import EpsImagePlugin, Image

from vlp_plugins.data.images import FORMATS, open_image
from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.sources import open_source
from vlp_plugins.runtime.errors import DataError

SIDE = 13_300


@pytest.fixture(scope="module")
def huge() -> bytes:
    """A PNG of 22 kB that takes half a gigabyte in memory."""
    data = BytesIO()
    Image.new("1", (SIDE, SIDE)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("kind", sorted({*FORMATS} - {"AVIF"}))
def test_every_format_of_pictures_is_decoded(kind: str) -> None:
    assert open_image(encoded(7, kind)).convert("RGB").size == (6, 4)


def test_nothing_but_pictures_is_decoded_whatever_it_is_called(photos: Path, monkeypatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", _started)
    monkeypatch.setattr(subprocess, "Popen", _started)
    (photos / "000.png").write_bytes(encoded(0, "EPS"))
    with pytest.raises(DataError, match="000.png: cannot identify image file"):
        read(open_source(str(photos)))


@pytest.mark.parametrize("place", ["clip.mp4", "."])
def test_videos_are_refused_in_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"video")
    with pytest.raises(DataError, match="clip.mp4 is a video, .* give its frames as images"):
        read(open_source(str(tmp_path / place)))
    (tmp_path / "metadata.csv").write_text("file_name,caption\nclip.mp4,a boat\n")
    with pytest.raises(DataError, match="clip.mp4 is a video, .* give its frames as images"):
        read(open_source(str(tmp_path / place)))


def _started(*_: object, **__: object) -> None:
    raise AssertionError("a program was started")


def test_a_picture_larger_than_the_limit_is_not_decoded(photos, huge, monkeypatch) -> None:
    (photos / "000.png").write_bytes(huge)
    wanted = r"000.png: its image of 13300 x 13300 pixels would take .* VLP_READ_LIMIT=507MiB"
    with pytest.raises(DataError, match=wanted):
        read(open_source(str(photos)))
    monkeypatch.setenv("VLP_READ_LIMIT", "507MiB")
    assert open_image(huge).size == (SIDE, SIDE)
    assert Image.MAX_IMAGE_PIXELS, "Pillow's own limit is as it was"


def test_a_line_of_pixels_is_no_picture() -> None:
    data = BytesIO()
    Image.new("1", (1, 100_000)).save(data, "PNG")
    with pytest.raises(ValueError, match="its image of 1 x 100000 pixels would take"):
        open_image(data.getvalue())


def test_the_limit_is_an_amount_of_memory(monkeypatch) -> None:
    monkeypatch.setenv("VLP_READ_LIMIT", "much")
    with pytest.raises(Exception, match="VLP_READ_LIMIT: 'much' is not an amount of memory"):
        open_image(encoded(1))


def layout(folder: Path, kind: str, name: str) -> Any:
    """Opens a data set of a kind, one image of which has that name."""
    row: dict[str, object] = {"file_name": name, "text": "words", "label": 1}
    if kind == "karpathy":
        row = {"filename": name, "split": "train", "sentences": [{"raw": "words"}]}
        (folder / "dataset_coco.json").write_text(json.dumps({"images": [row]}))
        return open_source(str(folder))
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return open_labelled(str(folder)) if kind == "labels" else open_source(str(folder))


@pytest.mark.parametrize("kind", ["captions", "labels", "karpathy"])
@pytest.mark.parametrize("name", ["../secret.png", "{above}/secret.png", "in/../../secret.png"])
def test_no_file_outside_of_the_folder_is_read(tmp_path, monkeypatch, kind, name) -> None:
    folder = tmp_path / "data"
    (folder / "in").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encoded(9))
    name = name.format(above=tmp_path)
    with pytest.raises(DataError, match=r"outside of .*; link its .* VLP_READ_OUTSIDE=1 if"):
        layout(folder, kind, name)
    monkeypatch.setenv("VLP_READ_OUTSIDE", "1")
    assert layout(folder, kind, name)


def test_a_link_in_the_folder_may_lead_out_of_it(photos: Path) -> None:
    moved = (photos / "000.png").rename(photos.parent / "moved.png")
    (photos / "000.png").symlink_to(moved)
    assert read(open_source(str(photos))) == list(enumerate(CAPTIONS))


def test_splits_may_share_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "a.png").write_bytes(encoded(3))
    row = {"file_name": "../a.png", "text": "words"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    assert read(open_source(str(tmp_path))) == [(3, "words")]
