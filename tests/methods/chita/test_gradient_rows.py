"""The same rows wherever they are kept, and errors that say what to do."""

from __future__ import annotations

import logging
import os
import resource
import signal
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from toy import toy_batches
from toy_loss import spoilt
from toy_rows import CPU, N, by_hand, matrix, toy_columns, toy_rows

from vlp_plugins.methods.chita.rows.stores import FileStore, Layout
from vlp_plugins.runtime.errors import DataError, NonFiniteError, OutputError, UnsupportedError

WAYS = ["ram", "disk", "passes"]
SMALL = 3000
"""Bytes: a few blocks of the toy."""


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "rows"


def options(way: str, folder: Path) -> dict:
    return {"keep_in": way, "folder": folder, "budget": None if way == "ram" else SMALL}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_the_gradients_of_the_batches_in_every_sweep(way, folder):
    expected = by_hand(toy_batches(N))
    with toy_rows(**options(way, folder)) as rows:
        assert (rows.n, rows.p) == expected.shape
        for sweep in (1, 2):
            torch.testing.assert_close(matrix(rows), expected, rtol=1e-5, atol=1e-7)
            assert rows.sweeps == sweep
        assert rows.rounding == 0


@pytest.mark.parametrize("way", WAYS)
def test_parts_ascend_and_hold_whole_blocks(way, folder):
    columns = toy_columns()
    with toy_rows(**options(way, folder), columns=columns) as rows:
        parts = [(start, start + part.shape[1]) for start, part in rows.parts()]
    assert (parts[0][0], parts[-1][1]) == (0, columns.p)
    assert all(stop == start for (_, stop), (start, _) in pairwise(parts))
    assert {start for start, _ in parts} <= set(columns.bounds or ())
    assert way == "ram" or len(parts) > 5


@pytest.mark.parametrize("way", WAYS)
def test_a_sweep_may_end_early(way, folder):
    expected = by_hand(toy_batches(N))
    with toy_rows(**options(way, folder)) as rows:
        for _ in rows.parts():
            break
        torch.testing.assert_close(matrix(rows), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_batches_that_are_not_finite_give_no_row_in_any_pass(way, folder, caplog):
    batches = toy_batches(N)
    batches[1] = spoilt(batches[1])
    expected = by_hand(batches, skip=(1,))
    with (
        caplog.at_level(logging.WARNING, "vlp_plugins"),
        toy_rows(batches, skip=True, **options(way, folder)) as rows,
    ):
        assert rows.n == N - 1
        for _ in range(2):
            torch.testing.assert_close(matrix(rows), expected, rtol=1e-5, atol=1e-7)
    assert "1 of 5 batches gave no row" in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_removed_weights_have_no_gradient(way, folder):
    columns = toy_columns()
    alive = torch.rand(columns.p, generator=torch.Generator().manual_seed(0)) > 0.5
    expected = by_hand(toy_batches(N)) * alive
    with toy_rows(**options(way, folder), alive=columns.split(alive)) as rows:
        torch.testing.assert_close(matrix(rows), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_rows_say_how_far_they_are_off(way, folder, caplog):
    expected = by_hand(toy_batches(N))
    with (
        caplog.at_level(logging.INFO, "vlp_plugins.methods.chita.rows"),
        toy_rows(**options(way, folder), dtype=torch.bfloat16) as rows,
    ):
        found = matrix(rows)
        assert {part.dtype for _, part in rows.parts()} == {torch.bfloat16}
    error = float((found - expected).double().norm() / expected.double().norm())
    assert rows.rounding == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 4e-3
    assert "torch.bfloat16 changes them by" in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_progress_counts_the_batches_of_all_passes(way, folder):
    seen: list[tuple[int, int | None]] = []
    told = options(way, folder) | {"progress": lambda *numbers: seen.append(numbers)}
    with toy_rows(**told) as rows:
        assert seen == [(i + 1, N if way != "passes" else None) for i in range(N)]
        matrix(rows)
        assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
        assert (len(seen) > N) == (way == "passes")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [0, 3])
def test_fewer_batches_than_rows_is_an_error_that_names_both(way, count, folder):
    message = "5 gradient rows .* only 3 batches" if count else "no batch was read"
    with (
        pytest.raises(DataError, match=message),
        toy_rows(toy_batches(count) if count else [], **options(way, folder)),
    ):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_are_not_finite_are_an_error(way, folder):
    batches = toy_batches(N)
    batches[2] = spoilt(batches[2])
    with pytest.raises(NonFiniteError, match="batch 2"), toy_rows(batches, **options(way, folder)):
        pass
    with (
        pytest.raises(NonFiniteError, match="all 5 batches were left out"),
        toy_rows([spoilt(b) for b in toy_batches(N)], skip=True, **options(way, folder)),
    ):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_gone_after_the_block(way, folder):
    with toy_rows(**options(way, folder)) as rows:
        pass
    with pytest.raises(UnsupportedError, match="inside `with gradient_rows`"):
        matrix(rows)


def test_the_file_has_no_name_and_leaves_nothing(folder):
    with toy_rows(**options("disk", folder)):
        assert list(folder.iterdir()) == []


def test_no_file_is_left_when_the_process_is_killed(folder):
    child = os.fork()
    if not child:
        store = FileStore(Layout(2, (0, 8)), torch.float32, folder)
        store.write(0, 0, torch.ones(8))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list(folder.iterdir()) == []


def open_files() -> int:
    """Of this process; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_disk_space_is_given_back_when_somebody_presses_ctrl_c(folder):
    def interrupted():
        yield from toy_batches(2)
        raise KeyboardInterrupt

    opened = open_files()
    with pytest.raises(KeyboardInterrupt), toy_rows(interrupted(), **options("disk", folder)):
        pass
    assert list(folder.iterdir()) == []
    assert open_files() == opened


@contextmanager
def files_of(size):
    """Files may have so many bytes: what the system says then is what a full disk says.

    Not a fixture: pytest writes its own log before a fixture ends.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_found_before_the_first_batch(folder):
    def batches():
        raise AssertionError("no batch should be read")
        yield

    with (
        files_of(8192),
        pytest.raises(OutputError, match=r"cannot keep 18\.8 KiB .*no space left.*keep_in='passes"),
        toy_rows(batches(), **options("disk", folder)),
    ):
        pass
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_while_rows_are_written_is_an_error(folder):
    store = FileStore(Layout(2, (0, 8192)), torch.float32, folder)
    store.write(0, 0, torch.ones(8192))
    full = pytest.raises(OutputError, match=r"64\.0 KiB of gradient rows in .*no space left")
    with files_of(40_000), full:
        store.write(1, 0, torch.ones(8192))
    store.close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot keep .* in .*file: .*choose another folder"),
        toy_rows(**options("disk", tmp_path / "file")),
    ):
        pass


def test_a_row_may_be_written_in_any_pieces(folder):
    layout = Layout(3, (10, 14, 15, 40))
    store = FileStore(layout, torch.float32, folder)
    expected = torch.rand(3, 30)
    for row in (2, 0, 1):
        for first, last in ((0, 1), (1, 17), (17, 30)):
            store.write(row, 10 + first, expected[row, first:last].to(CPU))
    found = [(start, part.clone()) for start, part in store.parts(3)]
    assert [start for start, _ in found] == [10, 14, 15]
    assert torch.equal(torch.cat([part for _, part in found], 1), expected)
    store.close()
