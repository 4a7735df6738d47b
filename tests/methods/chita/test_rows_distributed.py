"""Two processes hold half of the columns each, and find what one finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_rows_of_models import GOLDEN, solved
from toy import toy_batches
from toy_loss import spoilt
from toy_rows import N, by_hand, toy_rows
from two_processes import run_two_processes

from benchmarks.parity.family import Family
from vlp_plugins.models.discovery import registry

SCRIPT = Path(__file__).with_name("rows_script.py")
WAYS = ["ram", "disk", "passes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes under torchrun left what they found."""
    folder = tmp_path_factory.mktemp("torchrun")
    run_two_processes(SCRIPT, folder, GOLDEN)
    return folder


def together(parts: list[dict[int, torch.Tensor]]) -> torch.Tensor:
    """The parts of all processes side by side; fails if columns are missing or held twice."""
    joined = {start: part for own in parts for start, part in own.items()}
    assert len(joined) == sum(map(len, parts))
    assert all(parts), "every process holds columns"
    return torch.cat([joined[start] for start in sorted(joined)], 1)


@pytest.mark.parametrize("way", WAYS)
def test_all_columns_of_all_rows_are_somewhere(folder, way):
    expected = by_hand(toy_batches(N))
    (first, vector, bits, sums, _, _), (second, *others, _, _) = (
        torch.load(folder / f"{way}{rank}") for rank in (0, 1)
    )
    for sweep in (0, 1):
        found = together([first[sweep], second[sweep]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert [torch.equal(a, b) for a, b in zip((vector, bits, sums), others, strict=True)] == [
        True
    ] * 3
    torch.testing.assert_close(vector, expected.sum(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(bits, expected[0] > 0)
    assert sums.item() == 3


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_left_out_close_up(folder, way):
    batches = toy_batches(N)
    batches[1], batches[4] = spoilt(batches[1]), spoilt(batches[4])
    expected = by_hand(batches, skip=(1, 4))
    (n, *first), (_, *second) = (torch.load(folder / f"{way}{rank}")[4] for rank in (0, 1))
    assert n == N - 2
    for parts in zip(first, second, strict=True):
        torch.testing.assert_close(together(list(parts)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_know_the_rounding_of_all_columns(folder, way):
    with toy_rows(dtype=torch.bfloat16) as rows:
        expected = rows.rounding
    for rank in (0, 1):
        assert torch.load(folder / f"{way}{rank}")[5] == pytest.approx(expected, rel=1e-4)


def test_what_goes_wrong_in_one_process_is_raised_in_both(folder):
    for rank in (0, 1):
        errors, _ = torch.load(folder / f"errors{rank}")
        assert errors["gradient"].startswith("NonFiniteError: ")
        assert "batch 3" in errors["gradient"]
        assert "only 3 batches" in errors["fewer"]
        assert "the processes read different numbers of batches" in errors["other"]
        assert errors["disk"].startswith("OutputError: ")
        assert "largest block" in errors["budget"]
    assert "process 1: " in torch.load(folder / "errors0")[0]["gradient"]
    assert "process 1: cannot keep" in torch.load(folder / "errors0")[0]["disk"]


@pytest.mark.parametrize("block_size", [200, None])
def test_blip_is_pruned_as_by_one_process(folder, block_size):
    family = Family(GOLDEN / "blip")
    model = family.model()
    adapter = registry().adapter_for(model)
    batches = family.batches()[:3]
    rows, solution = solved(model, adapter, batches, block_size, ("ram", None))
    for way in ("disk", "passes"):
        found = [torch.load(folder / f"blip-{way}-{block_size}-{rank}") for rank in (0, 1)]
        held = torch.where(found[0][0].isnan(), found[1][0], found[0][0])
        assert (held - rows).norm() <= 1e-5 * rows.norm()
        for _, support, values, objective in found:
            assert objective == pytest.approx(solution.objective, rel=1e-5)
            assert torch.equal(support, solution.support)
            torch.testing.assert_close(values, solution.values, rtol=1e-5, atol=1e-5)
