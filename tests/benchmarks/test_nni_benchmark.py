"""The benchmark of hosts, in small, and what NNI costs at full size."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("nni", reason="the host is an extra")
pytest.importorskip("torch_pruning", reason="the host is an extra")

from benchmarks.speed.__main__ import main
from benchmarks.speed.hosts import NNI_TARGET, Row, large, measure


def test_the_benchmark_measures_and_says_what_holds(tmp_path, monkeypatch, capsys):
    arguments = ["hosts", "--models", "blip", "--methods", "omp", "wanda", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["speed", *arguments])

    assert main() == 0

    rows = json.loads((tmp_path / "hosts.json").read_text())["figures"]
    assert [row["method"] for row in rows] == ["omp", "wanda"]
    assert all(row["identical"] and row["ties"] and row["round_trip"] for row in rows)
    assert "2 of 2 ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flaw",
    [
        {"identical": False},
        {"ties": False},
        {"round_trip": False},
        {"torch_pruning": False},
        {"full_size": True, "nni_seconds": 3.1},
    ],
)
def test_one_flaw_is_enough(flaw):
    good = {"alone_seconds": 1.0, "nni_seconds": 1.0, "identical": True, "ties": True}
    assert Row("blip", "omp", **good, round_trip=True).ok
    assert not Row("blip", "omp", **{**good, "round_trip": True, **flaw}).ok


@pytest.mark.long
@pytest.mark.parametrize("method", ["omp", "multiflow"])
def test_one_global_group_at_full_size_takes_at_most_three_times_as_long(method):
    row = measure(large(batches=1), method, {}, rounds=3)
    assert row.identical
    assert row.ties
    assert row.ratio <= NNI_TARGET
