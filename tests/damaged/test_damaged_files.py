"""1,200 damaged files of every kind: each is read, or refused in one sentence."""

from __future__ import annotations

import pytest
from run import Tally, read_files

FILES = 1200


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tally]:
    return read_files(tmp_path_factory.mktemp("damaged"), FILES)


def test_every_file_ends_well_or_in_one_sentence(found: dict[str, Tally]) -> None:
    whole = Tally.of(found.values())
    assert whole.unexpected == []
    assert whole.files >= 0.95 * FILES
    assert whole.files == whole.read + whole.refused


def test_some_damage_is_found_of_every_kind_and_some_does_no_harm_of_nearly_all(found) -> None:
    """Else the files were refused for another reason, or were not damaged."""
    assert [name for name, tally in found.items() if not tally.refused] == []
    unread = [name for name, tally in found.items() if not tally.read]
    assert len(unread) <= 0.15 * len(found), unread
