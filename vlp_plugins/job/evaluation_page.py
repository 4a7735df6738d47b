"""The table and the page of `vlp evaluate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlp_plugins.report.page import Findings, Table

if TYPE_CHECKING:
    from vlp_plugins.job.evaluating import Evaluation

_TITLES = {
    "mean": "mean recall",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "cider": "CIDEr",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "spice": "SPICE",
    "accuracy": "accuracy",
    "top1": "top-1",
    "top5": "top-5",
}
_NOTES = {
    "retrieval": "Per cent of queries that find a partner among the first k.",
    "captioning": "Times 100. Higher is better.",
    "vqa": "Per cent: an answer is right if three people gave it, min(n/3, 1) over all but one.",
    "classification": "Per cent of images whose class is among the first k.",
}
_SHOWN_EXAMPLES = 20
_FEATURES = "features_"


def title_of(metric: str) -> str:
    """How a metric is called: `image_to_text_r1` is `image to text R@1`."""
    if metric in _TITLES:
        return _TITLES[metric]
    name, _, rank = metric.rpartition("_r")
    return f"{name.replace('_', ' ')} R@{rank}" if name and rank.isdecimal() else metric


def metrics_table(found: Evaluation) -> Table:
    """One row per metric: before, after, the difference."""
    header = ["metric", "model"] if found.after is None else ["metric", "before", "after", "change"]
    rows = []
    for name, title in _titles(found.before.metrics).items():
        value = found.before.metrics[name]
        row = [title, _number(value)]
        if found.after is not None:
            pruned = found.after.metrics.get(name, math.nan)
            row += [_number(pruned), f"{pruned - value:+.2f}"]
        rows.append(row)
    return Table(f"{found.task} on {found.data}", header, rows, _NOTES.get(found.task, ""))


def _titles(metrics: Mapping[str, float]) -> dict[str, str]:
    """Titles by name; of two stages of retrieval the ranking by features leads."""
    by_features = [name for name in metrics if name.startswith(_FEATURES)]
    titles = {
        name: f"{title_of(name.removeprefix(_FEATURES))} (features alone)" for name in by_features
    }
    second = {name.removeprefix(_FEATURES) for name in by_features}
    for name in metrics:
        titles.setdefault(name, title_of(name) + (" (re-ranked)" if name in second else ""))
    return titles


def sentences(found: Evaluation) -> list[str]:
    """What is worth saying: what the masks are, and which metrics are absent."""
    texts = []
    if found.masks is not None:
        texts.append(
            f"After: with masks of {found.masks['method']} at {found.masks['sparsity']:.2%} "
            f"sparsity ({_by_modality(found.masks['by modality'])})."
        )
        if found.masks["new weights"] is False:
            texts.append(
                "The new weights of the masks were left out, so that what the model has learned "
                "since they were computed stays."
            )
    absent = dict(found.before.absent) | dict(found.after.absent if found.after else {})
    texts += [f"{title_of(name)} is absent: {reason}." for name, reason in absent.items()]
    return texts


def findings_of(found: Evaluation, model: str, command: str) -> Findings:
    """The page."""
    tables = [metrics_table(found)]
    long_tables = []
    if found.before.said:
        after = found.after.said if found.after is not None else None
        rows = [
            [text] if after is None else [text, after[number]]
            for number, text in enumerate(found.before.said[:_SHOWN_EXAMPLES])
        ]
        header = ["model"] if after is None else ["before", "after"]
        long_tables.append(Table("What the model says", header, rows, "The first examples."))
    settings = {name: str(value) for name, value in found.settings.items()}
    return Findings(
        f"vlp evaluate: {found.task} of {model}",
        command,
        sentences(found),
        (),
        tables,
        long_tables,
        {**settings, **found.facts},
    )


def _by_modality(sparsities: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in sparsities.items())


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not finite"
