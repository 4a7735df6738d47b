"""One method alone and through NNI, on fresh copies of one model."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.speed.hosts.measured import Row, Subject
from vlp_plugins import Masks, prune
from vlp_plugins.hosts.nni import VlpPruner, finalize, masks_of, pruner_class
from vlp_plugins.hosts.nni.ties import ties_of

Made = TypeVar("Made")
CONFIG = [{"op_types": ["Linear"], "sparse_ratio": 0.75, "global_group_id": "all"}]


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
