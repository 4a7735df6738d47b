"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.papers.findings import Entry

_TITLES = {
    "blip": "BLIP",
    "xvlm": "X-VLM",
    "vit": "ViT",
    "vqa": "VQA",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "flowers102": "Flowers-102",
}


def title_of(name: str) -> str:
    """Of a model or a task."""
    return _TITLES.get(name, name)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns stand below each other; text is to the left.

    Args:
        header: `Sparsity` and `Method` and the like, then figures, which are to the right.
        rows: a cell per column.
    """
    escaped = [[text.replace("|", r"\|") for text in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
    left = [header[i] in ("Sparsity", "Method", "Collapse") for i in range(len(header))]
    lines = [
        " | ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(row, widths, left, strict=True)
        )
        for row in escaped
    ]
    rule = "|".join(
        f":{'-' * (width + 1)}" if is_left else f"{'-' * (width + 1)}:"
        for width, is_left in zip(widths, left, strict=True)
    )
    return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]


def percent(fraction: float) -> str:
    """A sparsity."""
    return f"{fraction:.0%}"


def bold(text: str) -> str:
    """What stands out."""
    return f"**{text}**"


def with_best(entries: Sequence[Entry]) -> list[str]:
    """The texts of a column in one group; the best, and what rounds to the same, is bold.

    A figure that is alone has nothing to be better than, and one that lacks seeds others have is
    not compared.
    """
    most = max((each.there for each in entries), default=0)
    means = [
        None if each.mean is None or each.there < most else round(each.mean, 1) for each in entries
    ]
    compared = sum(each.there > 0 for each in entries) > 1
    best = max((mean for mean in means if mean is not None), default=None) if compared else None
    return [
        bold(each.text) if best is not None and mean == best else each.text
        for each, mean in zip(entries, means, strict=True)
    ]
