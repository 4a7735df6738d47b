"""Exact thresholds in one sweep, where a sample of the scores is cheap.

The sorted sample gives a narrow bracket around each threshold. The sweep counts what lies below it
and picks what lies inside, about one element in a hundred, among which the threshold is found
exactly. If a guess was wrong the counts show it, and the histograms of `thresholds` decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlp_plugins.cuts import Cut, ScoreSource
from vlp_plugins.runtime.parallel import over_tensors

_DRAWS = 1 << 18  # elements of a sample of many tensors
_BLOCK = 1 << 17  # scores in a block: half a megabyte
_SIGMAS = 6.0  # half the width of a bracket, in standard errors of the sample's quantile


@dataclass(frozen=True)
class Sampled:
    """A tensor whose scores can be sampled without computing all of them.

    Attributes:
        numel: number of its elements.
        every: the scores of every n-th element, 1-D float32.
    """

    numel: int
    every: Callable[[int], torch.Tensor]


def bracketed_cuts(
    sources: Mapping[str, ScoreSource],
    samples: Mapping[str, Sampled],
    removals: Sequence[int],
    *,
    all_ties: bool,
    device: torch.device,
) -> dict[int, dict[str, Cut]]:
    """Cuts by removal, for those removals whose bracket held the threshold.

    Args:
        sources: as in `find_cuts`.
        samples: of the same tensors.
        removals: each above 0 and below the number of elements.
        all_ties: as in `find_cuts`.
        device: where the scores are.
    """
    total = sum(sample.numel for sample in samples.values())
    stride = spread(total // min(_DRAWS, max(1024, total // 128)))
    drawn = torch.cat([sample.every(stride).flatten().cpu() for sample in samples.values()])
    ordered = np.sort(drawn.numpy())
    brackets = [_bracket(ordered, removal / total) for removal in removals]

    def sweep(name: str) -> list[tuple[int, np.ndarray]]:
        scores = sources[name]().flatten()
        split = _below_and_inside if scores.device.type == "cpu" else _on_device
        return [split(scores, low, high) for low, high in brackets]

    swept = dict(zip(sources, over_tensors(sweep, sources, device), strict=True))
    found = {}
    for i, removal in enumerate(removals):
        cuts = _cuts({name: parts[i] for name, parts in swept.items()}, removal, all_ties)
        if cuts is not None:
            found[removal] = cuts
    return found


def _below_and_inside(scores: torch.Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    """How many scores are below `low`, and those from `low` to `high`.

    By NumPy, whose comparisons are faster than torch's on a CPU, in blocks that stay in a core's
    cache: fresh memory costs more time than comparing.
    """
    values = scores.numpy()
    below = 0
    inside = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        reached = block >= low
        below += len(block) - int(np.count_nonzero(reached))
        inside.append(np.compress(reached & (block <= high), block))
    return below, np.concatenate(inside) if inside else values


def _on_device(scores: torch.Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    reached = scores >= low
    inside = scores[reached & (scores <= high)]
    return int(scores.numel() - reached.count_nonzero()), inside.cpu().numpy()


def spread(stride: int) -> int:
    """The next stride without the factors of usual layer widths, so that all columns are met."""
    while any(stride % factor == 0 for factor in (2, 3, 5, 7)) and stride > 1:
        stride += 1
    return max(1, stride)


def _bracket(ordered: np.ndarray, fraction: float) -> tuple[float, float]:
    size = len(ordered)
    margin = _SIGMAS * (fraction * (1 - fraction) * size) ** 0.5 + 2
    low, high = int(fraction * size - margin), int(fraction * size + margin) + 1
    return (
        float(ordered[low]) if low >= 0 else -np.inf,
        float(ordered[high]) if high < size else np.inf,
    )


def _cuts(
    parts: Mapping[str, tuple[int, np.ndarray]], removal: int, all_ties: bool
) -> dict[str, Cut] | None:
    """The cuts from counts below the bracket and scores inside; None if the bracket missed."""
    inside = np.concatenate([values for _, values in parts.values()])
    rank = removal - sum(below for below, _ in parts.values())
    if not 1 <= rank <= len(inside):
        return None
    threshold = np.partition(inside, rank - 1)[rank - 1]
    quota = rank - int(np.count_nonzero(inside < threshold))
    cuts = {}
    for name, (below, values) in parts.items():
        equal = int(np.count_nonzero(values == threshold))
        ties = equal if all_ties else min(equal, quota)
        quota -= min(equal, quota)
        remove = below + int(np.count_nonzero(values < threshold)) + ties
        cuts[name] = Cut(remove, float(threshold), ties, equal)
    return cuts
