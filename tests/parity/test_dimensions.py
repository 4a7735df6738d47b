"""Our intrinsic dimensions beside those that the published code gave."""

import json
import shutil
from pathlib import Path

from benchmarks.parity.dimensions import compare_dimensions

GOLDEN = Path(__file__).parents[1] / "golden"


def test_every_recorded_dimension_is_reproduced():
    lines = list(compare_dimensions(GOLDEN))

    assert [str(line) for line in lines if not line.ok] == []
    assert len(lines) == 2 * 8
    assert {line.family for line in lines} == {
        f"id/{name}" for name in json.loads((GOLDEN / "id" / "expected.json").read_text())
    }
    assert max(line.worst for line in lines) < 1e-5


def test_a_dimension_that_differs_is_found(tmp_path):
    shutil.copytree(GOLDEN / "id", tmp_path / "id")
    recorded = json.loads((GOLDEN / "id" / "expected.json").read_text())
    cloud = recorded["swiss_roll_d2_in3"]
    cloud["block_dims"][3] *= 1.002
    (tmp_path / "id" / "expected.json").write_text(json.dumps({"swiss_roll_d2_in3": cloud}))

    slope, means = compare_dimensions(tmp_path)

    assert slope.ok
    assert not means.ok
    assert list(compare_dimensions(tmp_path / "id")) == []
