"""Folders of captioned pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from captioned_files import CAPTIONS, write_folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four pictures with captions in metadata.jsonl."""
    return write_folder(tmp_path / "photos", list(CAPTIONS))


@pytest.fixture
def numbered(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder of so many pictures; the caption of each is its number."""
    return lambda count: write_folder(tmp_path / f"of_{count}", [f"no. {n}" for n in range(count)])
