"""A search over methods and their parameters: BLIP at 75 %, retrieval, development split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.papers.cell import Cell
from benchmarks.papers.ways import WAYS
from vlp_plugins.scoring.factors import GUIDED

NAME = "_name"
"""The key under which NNI gives the chosen alternative of a nested choice."""
SPARSITY = 0.75
TRIALS = 24
OPTIONS = ("allocation", "floor")
"""What is drawn for `prune` itself; the rest is of the method."""

FRACTIONAL = ("floor", "lambda")
"""What is no whole number, even if it looks like one."""


def _choice(*values: Any) -> dict[str, Any]:
    return {"_type": "choice", "_value": list(values)}


_SHARED = {"allocation": _choice("global", "modality", "layer"), "floor": _choice(0.0, 0.1)}
_GUIDED = _choice(True, False)

SPACE = {
    "pruner": _choice(
        {NAME: "multiflow", **_SHARED, "id": _GUIDED},
        {NAME: "omp", **_SHARED, "id": _GUIDED},
        {NAME: "lamp", **_SHARED, "id": _GUIDED},
        {NAME: "snip", **_SHARED, "id": _GUIDED},
        {NAME: "wanda", "allocation": _choice("row", "global", "modality"), "id": _GUIDED},
        {NAME: "tamt", **_SHARED, "steps": _choice(24, 48, 72)},
        {
            NAME: "chita",
            "lambda": {"_type": "loguniform", "_value": [1e-9, 10.0]},
            "allocation": _choice("global", "modality"),
        },
    )
}
"""As NNI takes it: every method brings its own parameters."""


def drawn_cell(drawn: Mapping[str, Any], seed: int) -> Cell:
    """The cell of one trial; what was not drawn is as in the other tables."""
    given = dict(drawn["pruner"])
    name = given.pop(NAME)
    # NNI's manager hands 0.0 and 1.0 on as 0 and 1: the same cell must not get another name.
    given |= {key: float(given[key]) for key in FRACTIONAL if key in given}
    guided = given.pop("id", False)
    plain = WAYS[name]
    made = replace(
        plain,
        method=f"{GUIDED}{name}" if guided else name,
        options={key: given.pop(key) for key in OPTIONS if key in given},
        parameters={**plain.parameters, **given},
    )
    digest = hashlib.sha256(json.dumps(made.as_dict(), sort_keys=True).encode()).hexdigest()
    return Cell(
        "blip", "retrieval", replace(made, name=f"tpe-{name}-{digest[:8]}"), SPARSITY, seed, "dev"
    )
