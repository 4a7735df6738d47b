"""The ridge penalty of CHITA and CHITA++: the grid of Table 10 of MULTIFLOW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.papers.cell import Cell
from benchmarks.papers.ways import LAMBDA, WAYS, Way

MODELS = ("blip", "xvlm")
METHODS = ("chita", "chita++")
POWERS = tuple(float(f"1e{power}") for power in range(-5, 4))
"""Those of the paper."""
LAMBDAS = (LAMBDA, *POWERS)
"""With the one that the other tables prune with."""
SPARSITY = 0.63
SPACE = {
    "method": {"_type": "choice", "_value": list(METHODS)},
    "model": {"_type": "choice", "_value": list(MODELS)},
    "lambda": {"_type": "choice", "_value": list(LAMBDAS)},
}
"""As NNI takes it."""


def way(method: str, value: float) -> Way:
    """The way of the other tables with another penalty."""
    plain = WAYS[method]
    return Way(
        f"{method}-lambda-{value:g}",
        method,
        {**plain.parameters, "lambda": float(value)},
        batch_size=plain.batch_size,
        samples=plain.samples,
    )


def cell(model: str, method: str, value: float, seed: int) -> Cell:
    """Retrieval on the development split: what is chosen by must not be the test."""
    return Cell(model, "retrieval", way(method, value), SPARSITY, seed, "dev")


def cells(seed: int) -> list[Cell]:
    """The whole grid."""
    return [
        cell(model, method, value, seed)
        for method in METHODS
        for model in MODELS
        for value in LAMBDAS
    ]


def drawn_cell(drawn: Mapping[str, Any], seed: int) -> Cell:
    """The cell of one trial."""
    return cell(drawn["model"], drawn["method"], drawn["lambda"], seed)
