"""The search for something better than what is published: candidates, finalists, what was found.

Chosen by retrieval on the development split (`search`, then `finals` with more seeds), measured
once on the test split (`better`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.demo.processors import FAMILIES
from benchmarks.papers.cell import Cell
from benchmarks.papers.ways import LAMBDA, MORE, OURS, PAPER, WAYS, Way

SPARSITIES = (0.9, 0.75)
TEXT = {"text": 1.5}


def _trained(name: str, method: str, **others: Any) -> Way:
    """With the data of TAMT; it takes 48 steps of 8 pairs."""
    return Way(name, method, batch_size=8, samples=256, **others)


def _chita(name: str, method: str = "chita", *, samples: int = 128, **others: Any) -> Way:
    return Way(name, method, batch_size=4, samples=samples, **others)


CANDIDATES: tuple[Way, ...] = (
    Way("flow-global", "within", {"score": "flow", "by": "flow", "modality": False}),
    Way(
        "flow-by-magnitude-global",
        "within",
        {"score": "flow", "by": "magnitude", "modality": False},
    ),
    Way("flow-by-lamp", "within", {"score": "flow", "by": "lamp", "modality": False}),
    Way("flow-by-lamp-modality", "within", {"score": "flow", "by": "lamp"}),
    Way("flow-by-l2", "within", {"score": "flow", "by": "l2", "modality": False}),
    Way(
        "snip-by-lamp",
        "within",
        {"score": "snip", "by": "lamp", "modality": False},
        batch_size=8,
        samples=256,
    ),
    Way("wanda-by-lamp", "within", {"score": "wanda", "by": "lamp", "modality": False}),
    Way("multiflow-floor", "multiflow", options={"floor": 0.05}),
    Way("multiflow-text", "multiflow", tilt=TEXT),
    Way("lamp-text", "lamp", tilt=TEXT),
    Way("id-budgets-lamp", "lamp", options={"allocation": "id"}),
    _chita("chita-modality", parameters={"lambda": LAMBDA}, options={"allocation": "modality"}),
    WAYS["id-budgets-chita"],
    _chita(
        "chita++-modality",
        "chita++",
        parameters={"lambda": LAMBDA, "rounds": 4},
        options={"allocation": "modality"},
    ),
    Way("multiflow-refit", "refit", {"base": "multiflow"}),
    Way("lamp-refit", "refit", {"base": "lamp"}),
    Way(
        "flow-by-lamp-refit",
        "refit",
        {"base": "within", "score": "flow", "by": "lamp", "modality": False},
    ),
    _trained("tamt-refit", "refit", parameters={"base": "tamt", "steps": 48, "rows": 16}),
    _trained("tamt-modality", "tamt", parameters={"steps": 48}, options={"allocation": "modality"}),
    _trained("tamt-floor", "tamt", parameters={"steps": 48}, options={"floor": 0.02}),
    _trained("id-budgets-tamt", "tamt", parameters={"steps": 48}, options={"allocation": "id"}),
    _trained("joint", "joint", parameters={"steps": 48}),
    _trained("joint-slow", "joint", parameters={"steps": 48, "weight_lr": 3e-4}),
    _trained("joint-fast", "joint", parameters={"steps": 48, "weight_lr": 3e-3}),
    _trained("chita++-then-tamt", "staged", parameters={"first": "chita++", "second": "tamt"}),
    _trained("chita-then-tamt", "staged", parameters={"first": "chita", "second": "tamt"}),
    _trained("tamt-from-lamp", "tamt-from-lamp", parameters={"steps": 48}),
    _trained(
        "tamt-from-lamp-modality",
        "tamt-from-lamp",
        parameters={"steps": 48},
        options={"allocation": "modality"},
    ),
    _trained(
        "tamt-from-lamp-id-budgets",
        "tamt-from-lamp",
        parameters={"steps": 48},
        options={"allocation": "id"},
    ),
    _trained(
        "joint-slow-modality",
        "joint",
        parameters={"steps": 48, "weight_lr": 3e-4},
        options={"allocation": "modality"},
    ),
)
"""Ways to prune that nobody has published to our knowledge, cheap ones first."""

PUBLISHED: tuple[Way, ...] = (
    *(way for way in PAPER if way.name != "random"),
    *MORE,
)
"""What they must beat, on the same split."""

MORE_DATA = _chita("chita-512", parameters={"lambda": LAMBDA}, samples=512)
VARIANTS: tuple[Way, ...] = (
    MORE_DATA,
    Way("multiflow-first-owner", "multiflow", options={"owners": "first"}),
)
"""Published methods with other settings: as many samples as MULTIFLOW; its code's rule of ties."""

AS_PUBLISHED = frozenset(way.name for way in (*PUBLISHED, *VARIANTS)) | {"tamt-32-steps"}
"""Names of what others have published."""

CALLED = {
    "tamt-from-lamp-modality": "lamp-tamt",
    "tamt-from-lamp-id-budgets": "lamp-tamt-id",
}
"""What candidates are called since the first of them is a registered method."""

FINALISTS: tuple[str, ...] = (
    "tamt-from-lamp-modality",
    "tamt-from-lamp",
    "tamt-from-lamp-id-budgets",
    "tamt-modality",
    "joint-slow-modality",
)
"""The best at 90%, which are looked at again at 75%; beside the best of the published ones."""


def search_cells(seed: int) -> list[Cell]:
    """All candidates and references at 90%, then the finalists and references at 75%."""
    ways = {way.name: way for way in (*PUBLISHED, *VARIANTS, *CANDIDATES)}
    first = [(way, 0.9) for way in ways.values()]
    second = [(way, 0.75) for way in (*PUBLISHED, *(ways[name] for name in FINALISTS))]
    return [
        Cell(model, "retrieval", way, sparsity, seed, "dev")
        for way, sparsity in (*first, *second)
        for model in FAMILIES
    ]


def final_cells(seed: int) -> list[Cell]:
    """The two best of the search and the two best published ones, once more for other seeds."""
    found = [way for way in CANDIDATES if way.name in CALLED]
    return [
        Cell(model, "retrieval", way, sparsity, seed, "dev")
        for sparsity in SPARSITIES
        for way in (WAYS["tamt"], WAYS["chita++"], *found)
        for model in FAMILIES
    ]


ABLATED: tuple[Way, ...] = tuple(
    way for way in CANDIDATES if way.name in ("tamt-modality", "tamt-from-lamp")
)
"""What was found without LAMP at the start, and without a budget for each modality."""

FOUND = (
    OURS,
    _trained("lamp-tamt-id", "lamp-tamt", parameters={"steps": 48}, options={"allocation": "id"}),
)
SAME_GRADIENTS = (
    replace(WAYS["tamt"], name="tamt-32-steps", parameters={"steps": 32}),
    replace(OURS, name="lamp-tamt-32-steps", parameters={"steps": 32}),
)
"""Mask training with as many gradients as SNIP and the like: 256 samples' instead of 384."""


def better_cells(seed: int) -> list[Cell]:
    """What was found, its parts, and all published methods, on the test split."""
    ways = (*FOUND, *ABLATED, *reversed(PUBLISHED), *SAME_GRADIENTS, MORE_DATA)
    return [
        Cell(model, "retrieval", way, sparsity, seed)
        for way in ways
        for sparsity in SPARSITIES
        for model in FAMILIES
    ]
