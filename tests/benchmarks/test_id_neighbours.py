"""The benchmark of the search for neighbours, on a small size."""

import json

import torch

from benchmarks.speed import neighbours
from vlp_plugins.intrinsic.twonn import estimate


def test_it_prints_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    arguments = ["--sizes", "40x3000", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["neighbours", *arguments])

    neighbours.main()

    figures = json.loads((tmp_path / "id-neighbours-cpu.json").read_text())["figures"]
    assert [(f["n"], f["coordinates"], f["dtype"]) for f in figures] == [
        (40, 3000, "float32"),
        (40, 3000, "bfloat16"),
    ]
    for figure in figures:
        assert figure["share"] == figure["rate"] / figure["sgemm"]
    assert "%" in capsys.readouterr().out


def test_its_points_have_fewer_dimensions_than_coordinates():
    points = neighbours.curved(300, 2000, torch.device("cpu"))

    assert 8 < estimate(points).dimension < 25
