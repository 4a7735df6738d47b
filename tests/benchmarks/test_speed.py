"""The timings: their names, and the search for neighbours on a small size."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from benchmarks.speed import growth, neighbours
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


def test_without_a_gpu_its_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed", "gpu", "--device", "cpu"])
    assert main() == 1
    assert "there is no GPU here" in capsys.readouterr().out


def test_the_check_of_a_gpu_can_be_rehearsed(tmp_path, monkeypatch, capsys):
    words = ["--device", "cpu", "--rehearse", "--checks", "training", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["speed", "gpu", *words])
    assert main() == 0
    assert capsys.readouterr().out.startswith("training: ok")
    assert json.loads((tmp_path / "gpu-cpu.json").read_text())["figures"]["training"]["ok"]


def test_growth_finds_an_exponent_and_what_is_above_it():
    assert growth.exponent([1, 2, 8], [3.0, 12.0, 192.0]) == pytest.approx(2)
    assert growth.exponent([1, 2, 4, 8], [9.0, 9.0, 10.0, 20.0]) == pytest.approx(1)
    found = {"time_exponent": 1.2, "memory_exponent": 1.1, "predicted": [1, 1]}
    assert growth.above(found) == ["time"]


def test_signals_keep_their_size_in_the_layers_of_growth():
    inputs = torch.randn(8, growth.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = growth.stack(8_000_000, torch.device("cpu"))(inputs)
    assert 0.5 < float(outputs.std()) < 2


def test_growth_makes_its_page_of_what_it_records(tmp_path, monkeypatch, capsys):
    words = ["--axes", "batches", "--methods", "multiflow", "--rounds", "1", "--device", "cpu"]
    monkeypatch.setitem(growth.BASE, "weights", 1_000_000)
    monkeypatch.setattr("sys.argv", ["speed", "growth", *words, "--out", str(tmp_path)])
    main()
    said = capsys.readouterr().out
    curve = json.loads((tmp_path / "growth-cpu.json").read_text())["figures"]["batches"]
    assert curve["multiflow"]["sizes"] == [4, 8, 16, 32]
    assert len(curve["multiflow"]["seconds"]) == 4
    page = (tmp_path / "growth.md").read_text()
    assert f"{curve['multiflow']['time_exponent']:.2f} (at most 1)" in page
    assert said.startswith("batches | multiflow | 4: ")


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
