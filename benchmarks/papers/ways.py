"""Ways to prune: a method, its parameters, and the data it may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

LAMBDA = 1e-8
"""Of CHITA: near what `--lambda auto` chooses for these models (`benchmarks.demo.chita`)."""


@dataclass(frozen=True)
class Way:
    """How a model is pruned; everything in here decides the masks.

    Attributes:
        name: in tables and names of files.
        method: registered name, or one of `compositions`.
        parameters: of the method.
        options: of `prune`: allocation, floor, owners, variant.
        batch_size: pairs of a calibration batch. CHITA makes a row of every batch: many small ones
            serve it best.
        samples: calibration pairs.
        inverted: what the method would keep is removed, and as much of what it would remove is
            kept: a check that the score means something.
        tilt: by modality, how much denser than the whole model it stays; the others make up for it.
        dimensions: samples that intrinsic dimensions are measured with; 0: those of the method.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    samples: int = 512
    inverted: bool = False
    tilt: Mapping[str, float] = field(default_factory=dict)
    dimensions: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it, without the name, and without what most ways lack."""
        made = {key: value for key, value in asdict(self).items() if key != "name"}
        return {key: value for key, value in made.items() if value not in ({}, False, 0)}


PAPER = (
    Way("random", "random"),
    Way("snip", "snip", batch_size=8, samples=256),
    Way("itersnip", "itersnip", {"rounds": 8, "batches_per_round": 4}, batch_size=8, samples=256),
    Way("omp", "omp"),
    Way("lamp", "lamp"),
    Way("chita", "chita", {"lambda": LAMBDA}, batch_size=4, samples=128),
    Way("chita++", "chita++", {"lambda": LAMBDA, "rounds": 4}, batch_size=4, samples=128),
    Way("multiflow", "multiflow"),
)
"""The methods of the paper's main table, in its order."""

MORE = (
    Way("l2", "l2"),
    Way("tamt", "tamt", {"steps": 48}, batch_size=8, samples=256),
    Way("wanda", "wanda"),
    Way("taylor", "taylor", {"steps": 32}, batch_size=8, samples=256),
    Way("platon", "platon", {"steps": 32}, batch_size=8, samples=256),
)
"""The other registered methods that others have published."""

OURS = Way("lamp-tamt", "lamp-tamt", {"steps": 48}, batch_size=8, samples=256)
"""What the search of `candidates` found."""

ABLATION = (
    Way("multiflow-edges", "multiflow", {"nodes": False}),
    Way("multiflow-nodes", "multiflow", {"edges": False}),
    Way("multiflow-inverted", "multiflow", inverted=True),
)
"""Parts of MULTIFLOW, and what it would remove last."""

WITH_ID = tuple(
    replace(way, name=name, **changes)
    for way in PAPER
    if way.name in ("snip", "omp", "chita", "multiflow")
    for name, changes in (
        (f"id-factor-{way.name}", {"method": f"id*{way.method}"}),
        (f"id-budgets-{way.name}", {"options": {"allocation": "id"}}),
    )
)
"""With the intrinsic dimension of every layer as a factor, or budgets per modality by it."""

CALIBRATION_SIZES = (16, 64, 256, 1024, 3000)
_ROWS = 1024  # pairs of CHITA at most: it keeps a row of the model's size for every four

SIZED = tuple(
    replace(way, name=f"{way.name}-{samples}-pairs", samples=samples, batch_size=size)
    for way, size in ((PAPER[7], 8), (PAPER[1], 8), (PAPER[5], 4))
    for samples in CALIBRATION_SIZES
    if way.name != "chita" or samples <= _ROWS
)
"""MULTIFLOW, SNIP and CHITA by the number of calibration pairs."""

VIT_WAYS = (
    Way("omp", "omp"),
    Way("tamt", "tamt", samples=3000),  # a step for every batch of all images
    Way("multiflow-128-images", "multiflow", batch_size=8, samples=128),
    Way("multiflow-3000-images", "multiflow", batch_size=8, samples=3000),
)
"""Of a tower that reads images only; mask training sees as many of them as MULTIFLOW at most."""

WAYS: dict[str, Way] = {way.name: way for way in (*PAPER, *MORE, OURS, *ABLATION, *WITH_ID, *SIZED)}
