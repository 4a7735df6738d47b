"""Figures of one model on a task, by name, and how they are called."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_TITLES = {
    "mean": "mean recall",
    **{f"bleu{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)},
    "cider": "CIDEr",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "spice": "SPICE",
    "top1": "top-1",
    "top5": "top-5",
}
_FEATURES = "features_"


def title_of(metric: str) -> str:
    """How a metric is called: `image_to_text_r1` is `image to text R@1`."""
    if metric in _TITLES:
        return _TITLES[metric]
    name, _, rank = metric.rpartition("_r")
    return f"{name.replace('_', ' ')} R@{rank}" if name and rank.isdecimal() else metric


def titles_of(metrics: Mapping[str, float]) -> dict[str, str]:
    """Titles of metrics by name; of two stages of retrieval the ranking by features leads."""
    by_features = [name for name in metrics if name.startswith(_FEATURES)]
    titles = {
        name: f"{title_of(name.removeprefix(_FEATURES))} (features alone)" for name in by_features
    }
    second = {name.removeprefix(_FEATURES) for name in by_features}
    for name in metrics:
        titles.setdefault(name, title_of(name) + (" (re-ranked)" if name in second else ""))
    return titles


def shown(value: float, digits: int = 2) -> str:
    """A metric with so many digits after the point."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


@dataclass(frozen=True, repr=False)
class TaskMetrics(Mapping[str, float]):
    """Figures of one model: a mapping of the metrics, which prints as a table.

    Attributes:
        texts: captions or answers, in the order of the examples; empty for other tasks.
        title: task and data, the first line of what is printed.
        by_sample: of the metrics in `Task.score` a value for every sample, whose mean is the
            metric: so that two models can be compared sample by sample.
    """

    metrics: Mapping[str, float]
    absent: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[str] = ()
    title: str = ""
    by_sample: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def __repr__(self) -> str:
        titles = titles_of(self.metrics)
        lines = [self.title] if self.title else []
        width = max(map(len, titles.values()), default=0)
        for name, title in titles.items():
            lines.append(f"  {title:<{width}}  {shown(self.metrics[name]):>6}")
        lines += [f"  {title_of(name)} is absent: {why}" for name, why in self.absent.items()]
        return "\n".join(lines)
