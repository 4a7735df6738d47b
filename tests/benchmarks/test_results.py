"""Benchmarks print their figures, and change files of the repository only when told to."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.speed.__main__ import TIMINGS

ROOT = Path(results.__file__).parent
GOLDEN = ROOT.parent / "tests" / "golden"
CELLS_OR_RUNS = {"benchmarks.papers.__main__"}
"""They write what they are run for: the cells that are missing."""
SPEED = "benchmarks.speed.__main__"
"""One command, whose first word is what is timed."""
RECORDING = [(SPEED, name) for name in TIMINGS] + sorted(
    (name,)
    for path in ROOT.rglob("*.py")
    if "from benchmarks.results import" in (text := path.read_text(encoding="utf-8"))
    and "def main(" in text
    and (name := ".".join(("benchmarks", *path.relative_to(ROOT).with_suffix("").parts)))
    not in {*CELLS_OR_RUNS, SPEED}
)
ROUND = ["--rounds", "1", "--device", "cpu"]
CHEAP = [
    ("benchmarks.parity.__main__", str(GOLDEN)),
    (SPEED, "neighbours", "--sizes", "10x100", *ROUND),
    (SPEED, "chita", "--n", "8", "--p", "1e4", *ROUND),
]


def called(name: str, *words: str) -> None:
    """Runs a benchmark as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        importlib.import_module(name).main()


@pytest.mark.parametrize("command", RECORDING, ids=" ".join)
def test_every_benchmark_that_keeps_figures_takes_record(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        called(*command, "--help")
    assert "--record" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "demo.build_data", "papers", "parity", "speed"])
def test_help_does_not_wait_for_torch(name: str) -> None:
    script = (
        "import contextlib, runpy, sys; sys.argv = ['x', '--help']\n"
        f"with contextlib.suppress(SystemExit): runpy.run_module('benchmarks.{name}', "
        "run_name='__main__')\n"
        "sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], stdout=-1, text=True, check=True)
    assert ran.stdout.startswith("usage: ")


@pytest.mark.parametrize("command", CHEAP, ids=" ".join)
def test_figures_are_written_with_record_alone(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    called(*command)
    assert "--record writes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    called(*command, "--record")
    (file,) = tmp_path.iterdir()
    assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["id_gain", "structured"])
def test_what_is_not_recorded_of_a_comparison_is_neither_run_nor_written(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = importlib.import_module(f"benchmarks.papers.{name}.__main__")
    there = sorted((ROOT / "results" / name).glob("blip-*.json"))[1:]
    (tmp_path / name).mkdir()
    for path in there:
        (tmp_path / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "CELLS", tmp_path / name)

    called(module.__name__, "--models", "blip")

    said = capsys.readouterr().out
    assert "cells are not recorded; --record runs them" in said
    assert "R@1" in said
    assert [path.name for path in sorted(tmp_path.rglob("*.json"))] == [p.name for p in there]


def test_another_folder_stands_instead_of_record(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        called(SPEED, "neighbours", "--record", "--out", "elsewhere")
    assert "not allowed with" in capsys.readouterr().err
