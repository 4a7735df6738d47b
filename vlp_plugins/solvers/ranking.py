"""The largest of many scores: an exact number of them, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vlp_plugins.runtime.parallel import over_tensors
from vlp_plugins.scoring.threshold import SAMPLED_FROM, Cut, Sampled, ScoreSource, find_cuts

_CHUNK = 1 << 18
"""Scores in work at a time on one core: they stay in its cache."""
_DEVICE_CHUNK = 1 << 22


def top(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` largest of a vector; of equal ones the last stay.

    Args:
        scores: float32 `[p]`, no NaN.
        keep: how many, 0 to p.

    Returns:
        bool `[p]`, `keep` of them true.
    """
    return top_by(lambda entries: scores[entries], len(scores), keep, scores.device)


def top_by(
    scores: Callable[[slice], torch.Tensor], p: int, keep: int, device: torch.device
) -> torch.Tensor:
    """The same for scores that are computed anew whenever a chunk of them is needed.

    Args:
        scores: computes the float32 scores of a slice, of any step; called from several threads.
        p: the number of scores.
        keep: how many to take, 0 to p.
        device: where the scores are.

    Returns:
        bool `[p]`, `keep` of them true.
    """
    if p < SAMPLED_FROM and device.type == "cpu" and 0 < keep < p:
        few = scores(slice(0, p, 1))
        return _cut(few, p - keep).mask(few)
    size = _CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    chunks = {str(first): slice(first, min(first + size, p), 1) for first in range(0, p, size)}
    cuts = find_cuts(
        {name: _source(scores, chunk) for name, chunk in chunks.items()},
        [p - keep],
        device=device,
        samples={name: _sampled(scores, chunk) for name, chunk in chunks.items()},
    )[0]
    chosen = torch.empty(p, dtype=torch.bool, device=device)

    def choose(name: str) -> None:
        chosen[chunks[name]] = cuts[name].mask(scores(chunks[name]))

    over_tensors(choose, chunks, device)
    return chosen


def _source(scores: Callable[[slice], torch.Tensor], chunk: slice) -> ScoreSource:
    return lambda: scores(chunk)


def _sampled(scores: Callable[[slice], torch.Tensor], chunk: slice) -> Sampled:
    return Sampled(
        chunk.stop - chunk.start, lambda every: scores(slice(chunk.start, chunk.stop, every))
    )


def _cut(scores: torch.Tensor, remove: int) -> Cut:
    """The cut that removes the smallest scores, by NumPy: ten times as fast as torch on a CPU."""
    values = scores.numpy()
    threshold = np.partition(values, remove - 1)[remove - 1]
    below = int(np.count_nonzero(values < threshold))
    equal = int(np.count_nonzero(values == threshold))
    return Cut(remove, float(threshold), remove - below, equal)
