"""The timings: their names, and the search for neighbours on a small size."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from benchmarks.speed import neighbours
from benchmarks.speed.__main__ import TIMINGS, main
from vlp_plugins.dimension.twonn import estimate


@pytest.mark.parametrize("words", [[], ["--help"], ["hosts", "--help"]], ids=str)
def test_help_does_not_wait_for_torch(words):
    program = "import sys; from benchmarks.speed.__main__ import main"
    program += f"\nsys.argv[1:] = {words}\ntry: main()"
    program += "\nfinally: print({'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert said.stderr == "set()\n"
    assert (
        "--methods" in said.stdout if "hosts" in words else all(n in said.stdout for n in TIMINGS)
    )


@pytest.mark.parametrize("name", TIMINGS)
def test_every_name_has_its_module(name):
    if name == "hosts":
        pytest.importorskip("nni", reason="the host is an extra")
        pytest.importorskip("torch_pruning", reason="the host is an extra")
    module = import_module(f"benchmarks.speed.{name.replace('-', '_')}")
    assert callable(module.run)
    assert module.__doc__.startswith(f"python -m benchmarks.speed {name}: ")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_what_a_timing_returns(returned, code, monkeypatch):
    asked = []
    monkeypatch.setattr(neighbours, "run", lambda options: asked.append(options) or returned)
    monkeypatch.setattr("sys.argv", ["speed", "neighbours", "--sizes", "7x9", "--device", "cpu"])
    assert main() == code
    assert asked[0].sizes == [(7, 9)]
    assert asked[0].device == torch.device("cpu")


def test_neighbours_prints_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    arguments = [
        "neighbours",
        "--sizes",
        "40x3000",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["speed", *arguments])

    assert main() == 0

    figures = json.loads((tmp_path / "id-neighbours-cpu.json").read_text())["figures"]
    assert [(f["n"], f["coordinates"], f["dtype"]) for f in figures] == [
        (40, 3000, "float32"),
        (40, 3000, "bfloat16"),
    ]
    for figure in figures:
        assert figure["share"] == figure["rate"] / figure["sgemm"]
    assert "%" in capsys.readouterr().out


def test_points_of_neighbours_have_fewer_dimensions_than_coordinates():
    points = neighbours.curved(300, 2000, torch.device("cpu"))

    assert 8 < estimate(points).dimension < 25


def test_solvers_print_their_ratios_and_how_they_grow(tmp_path, monkeypatch, capsys):
    sizes = ["--inputs", "128", "256", "--outputs", "16", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["speed", "solvers", *sizes, "--out", str(tmp_path)])
    assert main() in (0, 1)  # how long it takes is not for a test to say
    said = capsys.readouterr().out
    assert "from 128 to 256 inputs: sparsegpt ^" in said
    assert "over" in (tmp_path / "solvers-speed.json").read_text()
