"""python -m benchmarks.speed hosts: every registered method alone, in NNI and in Torch-Pruning.

On small recorded models of BLIP (whose text towers share weights) and X-VLM:

- the same masks and weights with and without NNI, bit for bit;
- shared weights are still shared, and `save_pretrained` / `from_pretrained` keep the zeros;
- the method cuts the model as an importance of Torch-Pruning.

`--full-size` adds OMP and MULTIFLOW on BLIP base at 224 px with one `global_group_id`, where NNI
may take at most three times as long as `prune` alone. The exit code is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.parity.family import Family
from benchmarks.results import recorded
from benchmarks.speed.workload import full_size, random_batches
from vlp_plugins.hosts.nni.finalization import finalize, masks_of
from vlp_plugins.hosts.nni.pruner import VlpPruner, pruner_class
from vlp_plugins.hosts.nni.wrapper import ties_of
from vlp_plugins.hosts.torch_pruning.structured import prune_structured
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import VlpError, first_line

Made = TypeVar("Made")
CONFIG = [{"op_types": ["Linear"], "sparse_ratio": 0.75, "global_group_id": "all"}]
NNI_TARGET = 3.0
"""Time through NNI over time alone, at full size; small models spend it on other things."""
QUICK: dict[str, dict[str, Any]] = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
}
"""Parameters with which methods take less time and are the same methods."""


@dataclass(frozen=True)
class Subject:
    """A model that is pruned.

    Attributes:
        name: `blip`, `xvlm`, `blip base`.
        model: makes a new one, always the same.
        batches: calibration batches.
        full_size: whether times are worth comparing.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: list[Batch]
    full_size: bool = False


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        subject: name of the model.
        method: registered name.
        alone_seconds: `prune` and `apply` without a host.
        nni_seconds: pruner, masks and plain model through NNI.
        identical: whether masks and all weights are bit for bit the same both ways.
        ties: whether every shared Parameter is one object afterwards.
        round_trip: whether `save_pretrained` and `from_pretrained` keep zeros and all values.
        torch_pruning: whether the method cuts the model as an importance of Torch-Pruning, so that
            the result equals the masked dense model; None if it was not asked.
        full_size: whether the ratio of times counts.
        notes: what went wrong.
    """

    subject: str
    method: str
    alone_seconds: float
    nni_seconds: float
    identical: bool
    ties: bool
    round_trip: bool
    torch_pruning: bool | None = None
    full_size: bool = False
    notes: str = ""

    @property
    def ratio(self) -> float:
        """Time through NNI over time alone."""
        return self.nni_seconds / self.alone_seconds

    @property
    def ok(self) -> bool:
        """Whether everything is as it shall be."""
        slow = self.full_size and self.ratio > NNI_TARGET
        held = self.identical and self.ties and self.round_trip
        return held and self.torch_pruning is not False and not slow

    def record(self) -> dict[str, Any]:
        """For the file of results."""
        return {**asdict(self), "ratio": self.ratio, "ok": self.ok}


def measure(subject: Subject, method: str, parameters: Mapping[str, Any], rounds: int = 1) -> Row:
    """Both ways, in turns; the best time of each counts.

    Args:
        subject: the model.
        method: registered name.
        parameters: of the method.
        rounds: how often both are run.
    """
    alone_seconds, nni_seconds = [], []
    for _ in range(rounds):
        (masks, alone), seconds = _timed(_alone, subject, method, parameters)
        alone_seconds.append(seconds)
        (pruner, final), seconds = _timed(_through_nni, subject, method, parameters)
        nni_seconds.append(seconds)
    found = masks_of(pruner)
    return Row(
        subject=subject.name,
        method=method,
        alone_seconds=min(alone_seconds),
        nni_seconds=min(nni_seconds),
        identical=found == masks and _equal(alone, final),
        ties=ties_of(final) == ties_of(alone),
        round_trip=_round_trip(final, found),
        full_size=subject.full_size,
    )


def _alone(
    model: nn.Module, subject: Subject, method: str, parameters: Mapping[str, Any]
) -> tuple[Masks, nn.Module]:
    masks = prune(model, subject.batches, method=method, sparsity=0.75, **parameters)
    masks.apply(model)
    return masks, model


def _through_nni(
    model: nn.Module, subject: Subject, method: str, parameters: Mapping[str, Any]
) -> tuple[VlpPruner, nn.Module]:
    pruner = pruner_class(method)(model, CONFIG, batches=subject.batches, **parameters)
    pruner.compress()
    return pruner, finalize(pruner)


def _timed(way: Callable[..., Made], subject: Subject, *of_method: Any) -> tuple[Made, float]:
    """What one way makes of a fresh model, and the seconds that it takes."""
    model = subject.model()
    gc.collect()
    begin = time.perf_counter()
    made = way(model, subject, *of_method)
    return made, time.perf_counter() - begin


def _equal(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    return list(states[0]) == list(states[1]) and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


def _round_trip(model: nn.Module, masks: Masks) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded = type(model).from_pretrained(folder, trust_remote_code=False)  # type: ignore[attr-defined]
    return masks.verify(loaded) == [] and _equal(model, loaded)


def works(subject: Subject, method: str, parameters: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether half of the model can be cut by a method, and if not why.

    The cut is checked against the dense model with the same rows and columns at zero (1e-5).
    """
    try:
        result = prune_structured(
            subject.model(), subject.batches, importance=method, ratio=0.5, **parameters
        )
    except VlpError as error:
        return False, first_line(error)
    went = sum(removed for removed, _ in result.removed.values())
    return went > 0 and result.error is not None and result.error <= 1e-5, ""


def small(family: str, golden: Path) -> Subject:
    """A recorded model."""
    recorded = Family(golden / family)
    return Subject(family, recorded.model, recorded.batches()[:4])


def large(batches: int) -> Subject:
    """BLIP base with random weights."""
    device = torch.device("cpu")
    data: list[Any] = random_batches(batches, 8, device)
    return Subject("blip base", lambda: full_size("blip", device), data, full_size=True)


def line(row: Row) -> str:
    """One line of the table."""
    cut = {None: "-", True: "yes", False: "NO"}[row.torch_pruning]
    said = ["yes" if held else "NO" for held in (row.identical, row.ties, row.round_trip)]
    return (
        f"{row.subject:10} {row.method:17} {row.alone_seconds:8.2f} {row.nni_seconds:8.2f} "
        f"{row.ratio:6.2f}   {said[0]:9} {said[1]:5} {said[2]:10} {cut:13} "
        f"{'ok' if row.ok else 'NOT OK'} {row.notes}"
    ).rstrip()


def run(options: argparse.Namespace) -> int:
    """Measures, prints, records; 0 if everything holds."""
    print(f"{'model':10} {'method':17} {'alone s':>8} {'NNI s':>8} {'ratio':>6}   "
          "identical ties  round trip torch-pruning")  # fmt: skip
    logger = logging.getLogger("vlp_plugins")
    level = logger.level
    logger.setLevel(logging.ERROR)  # which layers stay dense
    disable_progress_bar()
    rows = []
    try:
        for row in measured(options):
            rows.append(row)
            print(line(row), flush=True)
    finally:
        logger.setLevel(level)
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(failed)} of {len(rows)} ok; at full size NNI may take "
          f"{NNI_TARGET:g} times as long")  # fmt: skip
    print(recorded("hosts", [row.record() for row in rows], options.out))
    return 1 if failed or not rows else 0


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """What the command line asks for, each as soon as it is known."""
    methods = registry().method_names() if options.methods is None else options.methods
    for family in options.models:
        subject = small(family, options.golden)
        for method in methods:
            parameters = QUICK.get(method, {})
            row = measure(subject, method, parameters)
            held, why = works(subject, method, parameters)
            yield replace(row, torch_pruning=held, notes=why)
    if options.full_size:
        for method in ("omp", "multiflow"):
            yield measure(large(options.batches), method, {}, options.rounds)
