"""Names and notes of files may be anything; a terminal and a spreadsheet show them as text."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

import torch

from vlp_plugins.cli.program import explain
from vlp_plugins.cli.terminal import print_facts, print_lines, print_table, show_log, steps_shown
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.report.layers import LayerRow, csv_text, to_csv
from vlp_plugins.runtime.errors import DataError

HOSTILE = "a\x1b]0;owned\x07\x9b2J\x08\u202eb"
SHOWN = r"a\x1b]0;owned\x07\x9b2J\x08\u202eb"


def test_a_terminal_gets_no_control_characters(capsys, tmp_path, vlp) -> None:
    assert explain(DataError(HOSTILE))[0] == f"error: {SHOWN}"
    assert explain(KeyError(HOSTILE))[0].isprintable()
    print_table(HOSTILE, ["name"], [[HOSTILE]])
    print_lines([f"{HOSTILE}\n\tmore"])
    print_facts({HOSTILE: HOSTILE})
    before = logging.getLogger().handlers[:]
    try:
        show_log()
        logging.getLogger("vlp_plugins.anything").warning("%s", HOSTILE)
        with steps_shown():
            logging.getLogger("vlp_plugins.methods.x").info("%s", HOSTILE)
    finally:
        logging.getLogger().handlers[:] = before
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 5
    assert err == f"warning: {SHOWN}\n{SHOWN}\n"
    assert all(line.expandtabs().isprintable() for line in out.splitlines())
    found = vlp("masks", "show", tmp_path / HOSTILE.replace("/", ""), code=2)
    assert SHOWN in found.stderr


def test_a_note_in_a_mask_file_is_shown_without_control_characters(vlp, tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    weights = WeightMap.of(model, ModuleAdapter(model))
    dense = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    manifest = Manifest.for_weights(
        weights, method=HOSTILE, note=HOSTILE, calibration={"x": HOSTILE}
    )
    Masks.from_dense(dense, manifest).save(tmp_path / "m.safetensors")
    text = vlp("masks", "show", tmp_path / "m.safetensors").stdout
    assert text.count(SHOWN) == 3
    assert "\x1b" not in text


def layers_text(names: list[str]) -> str:
    return to_csv([LayerRow(name, "text", 0, (2, 1), 1, (0.5,), (1,)) for name in names], ["0.5"])


def test_no_cell_is_a_formula() -> None:
    text = layers_text(['=HYPERLINK("http://x","y")', "-0.5"])
    cells = [line[0] for line in csv.reader(io.StringIO(text))]
    assert cells == ["name", """'=HYPERLINK("http://x","y")""", "-0.5"]
    for cell in ("+1+cmd|'/C calc'!A0", "@SUM(A1)", "-2+3", "\t=1", " =1"):
        assert csv_text([[cell]]).lstrip('"').startswith("'"), cell
    assert csv_text([["-1e-3", "+inf", -2.5, -1, "a=b", ""]]) == "-1e-3,+inf,-2.5,-1,a=b,\n"


def test_one_place_writes_comma_separated_text() -> None:
    root = Path(__file__).parents[2]
    homes = (root / "vlp_plugins", root / "adapters", root / "benchmarks")
    found = [p.name for home in homes for p in home.rglob("*.py") if "csv.writer" in p.read_text()]
    assert found == ["layers.py"]
