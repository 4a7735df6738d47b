"""The compositions that are looked at, on the development split."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.cell import Cell
from benchmarks.tables.ways import LAMBDA, WAYS, Way

TEXT = {"text": 1.5}


def _trained(name: str, method: str, **others: Any) -> Way:
    """With the budget of TAMT: 48 steps of 8 pairs."""
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
    Way("multiflow-first-owner", "multiflow", options={"owners": "first"}),
    Way("multiflow-text", "multiflow", tilt=TEXT),
    Way("lamp-text", "lamp", tilt=TEXT),
    Way("id-budgets-lamp", "lamp", options={"allocation": "id"}),
    _chita("chita-modality", parameters={"lambda": LAMBDA}, options={"allocation": "modality"}),
    _chita("chita-id-budgets-2", parameters={"lambda": LAMBDA}, options={"allocation": "id"}),
    _chita("chita-512", parameters={"lambda": LAMBDA}, samples=512),
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
"""Ways to prune that nobody has published, cheap ones first."""

PUBLISHED = ("omp", "lamp", "chita", "chita++", "multiflow", "tamt", "taylor", "platon")
"""What they must beat, on the same split."""

REFERENCES: tuple[Way, ...] = tuple(WAYS[name] for name in PUBLISHED)

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
    ways = {way.name: way for way in (*REFERENCES, *CANDIDATES)}
    first = [(way, 0.9) for way in ways.values()]
    second = [(ways[name], 0.75) for name in (*PUBLISHED, *FINALISTS)] if FINALISTS else []
    return [
        Cell(model, "retrieval", way, sparsity, seed, "dev")
        for way, sparsity in (*first, *second)
        for model in ("blip", "xvlm")
    ]


STRONGEST = ("lamp", "chita", "chita++", "tamt")
"""The published methods that the search has at the top of one model or the other."""

OURS = (
    WAYS["lamp-tamt"],
    _trained("lamp-tamt-id", "lamp-tamt", parameters={"steps": 48}, options={"allocation": "id"}),
)
ABLATED = (
    _trained("tamt-modality", "tamt", parameters={"steps": 48}, options={"allocation": "modality"}),
    _trained("tamt-from-lamp", "tamt-from-lamp", parameters={"steps": 48}),
)
"""Without LAMP at the start, and without a budget for each modality."""


def final_cells(seed: int) -> list[Cell]:
    """The two best of the search once more on the development split, for another seed."""
    names = {"tamt-from-lamp-modality", "tamt-from-lamp-id-budgets"}
    ways = [WAYS["tamt"], WAYS["chita++"], *(w for w in CANDIDATES if w.name in names)]
    return [
        Cell(model, "retrieval", way, sparsity, seed, "dev")
        for sparsity in (0.9, 0.75)
        for way in ways
        for model in ("blip", "xvlm")
    ]


def better_cells(seed: int) -> list[Cell]:
    """What was found, its parts, and the strongest published methods, on the test split."""
    ways = (*(WAYS[name] for name in STRONGEST), *ABLATED, *OURS)
    return [
        Cell(model, "retrieval", way, sparsity, seed)
        for sparsity in (0.9, 0.75)
        for way in reversed(ways)
        for model in ("blip", "xvlm")
    ]
