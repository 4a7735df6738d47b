"""Where rows will be kept, and what is said about it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_columns import columns_of

from vlp_plugins.methods.chita.rows.plan import RowNeeds
from vlp_plugins.runtime.errors import OutputError, UnsupportedError
from vlp_plugins.runtime.memory import bytes_of, free_ram, spill_folder

COLUMNS = columns_of([100_000, 50_000, 50_000], 1000)
N = 10
ROWS = N * COLUMNS.p * 4
FREE = Path.cwd()


def plan(budget: int | None, **options):
    settings = {"folder": FREE, "dtype": torch.float32, **options}
    return RowNeeds(COLUMNS, N, budget, **settings).plan()


@pytest.fixture
def full_disk(monkeypatch):
    """A disk with a megabyte left."""
    usage = shutil.disk_usage(FREE)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_rows_that_fit_stay_in_memory():
    found = plan(ROWS, sweeps=7)
    assert (found.keep_in, found.groups, found.passes) == ("ram", 1, 1)
    assert (found.ram_bytes, found.disk_bytes, found.gradient_batches) == (ROWS, 0, N)
    assert found.lines[-1].startswith("next to them 2.5 MiB of weights")


def test_rows_that_do_not_fit_go_to_disk():
    found = plan(ROWS - 1, sweeps=7)
    assert (found.keep_in, found.disk_bytes, found.gradient_batches) == ("disk", ROWS, N)
    assert found.ram_bytes <= ROWS // 4  # a part in work, and the next one
    assert str(FREE) in found.lines[0]
    assert found.lines[1].startswith("not in memory: 10 rows of 200,000 columns need 7.6 MiB")


def test_rows_that_fit_nowhere_are_gathered_in_passes(full_disk):
    found = plan(ROWS // 3, sweeps=7)
    assert found.keep_in == "passes"
    assert found.groups >= 3
    assert found.passes == 7 * found.groups
    assert found.gradient_batches == N * found.passes
    assert ROWS // 4 <= found.ram_bytes <= ROWS // 3
    assert f"all {N} batches again, {found.groups} times" in found.lines[0]
    assert found.lines[2].startswith("not on disk: ")


def test_what_is_free_decides_where_no_budget_is_given(monkeypatch):
    assert free_ram() > 1 << 20
    assert plan(None).keep_in == "ram"
    monkeypatch.setattr("vlp_plugins.runtime.memory.free_ram", lambda: 9_000_000)
    assert plan(None).keep_in == "disk"


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("vlp_plugins.runtime.memory.free_ram", lambda: 20_000_000)
    assert plan(None).keep_in == "ram"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan(None).keep_in == "disk"


@pytest.mark.parametrize("keep_in", ["ram", "disk", "passes"])
def test_the_budget_named_in_the_error_is_the_least_that_works(keep_in, monkeypatch):
    with pytest.raises(UnsupportedError, match="memory_budget=") as caught:
        plan(1000, keep_in=keep_in)
    amount = bytes_of(str(caught.value).split("memory_budget='")[1].split("'")[0])
    assert plan(amount, keep_in=keep_in).ram_bytes <= amount
    with pytest.raises(UnsupportedError):
        plan(int(0.9 * amount), keep_in=keep_in)


def test_a_budget_below_one_block_is_an_error_that_names_the_block():
    with pytest.raises(UnsupportedError, match=r"largest block \(1,000 columns\) take 39.1 KiB"):
        plan(39_999)
    assert plan(40_000).ram_bytes == 40_000


def test_smaller_rows_take_half_and_a_part_in_float32_counts():
    found = plan(ROWS // 2 + 4 * N * 1000, dtype=torch.bfloat16)
    assert found.keep_in == "ram"
    assert found.ram_bytes == ROWS // 2 + 4 * N * 1000
    assert plan(ROWS // 2, dtype=torch.bfloat16).keep_in == "disk"


def test_a_disk_without_room_is_an_error_where_it_was_asked_for(full_disk):
    with pytest.raises(OutputError, match=r"need 7\.6 MiB of disk, but .* has room for 921\.6 KiB"):
        plan(100_000, keep_in="disk")


def test_large_files_go_where_disks_are(tmp_path, monkeypatch):
    assert spill_folder(tmp_path) == tmp_path
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert spill_folder(None) == tmp_path
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr("tempfile.tempdir", None)
    assert spill_folder(None) == Path("/var/tmp") or not Path("/var/tmp").exists()


def test_a_folder_that_does_not_exist_yet_can_be_planned_for(tmp_path):
    assert plan(100_000, folder=tmp_path / "a" / "b", keep_in="disk").keep_in == "disk"


def test_parts_and_groups_stay_within_the_budget():
    for budget in (40_000, 55_555, 400_000, 4_000_000):
        found = plan(budget, keep_in="passes")
        assert found.ram_bytes <= budget
        for group in found.cuts:
            for cuts in group:
                assert 4 * N * (cuts[-1] - cuts[0]) <= budget
