"""Table 10 of the MULTIFLOW paper, for reference: other models, other data, other budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

POWERS = range(-5, 4)

FIGURES: Mapping[tuple[str, str], Sequence[tuple[str, str, str]]] = {
    ("blip", "chita"): (
        ("0.00", "0.02", "0.01"),
        ("0.00", "0.02", "0.01"),
        ("0.02", "0.02", "0.02"),
        ("62.10", "47.63", "54.87"),
        ("66.42", "50.85", "58.64"),
        ("65.48", "50.20", "57.84"),
        ("66.44", "50.77", "58.61"),
        ("65.10", "50.42", "57.76"),
        ("65.42", "50.04", "57.73"),
    ),
    ("xvlm", "chita"): (
        ("0.50", "0.34", "0.42"),
        ("0.80", "0.71", "0.76"),
        ("11.48", "9.23", "10.36"),
        ("64.98", "50.71", "57.85"),
        ("72.54", "57.45", "65.00"),
        ("72.54", "57.40", "64.97"),
        ("72.78", "57.30", "65.04"),
        ("72.66", "57.23", "64.94"),
        ("72.84", "57.33", "65.09"),
    ),
    ("blip", "chita++"): (
        ("0.06", "0.02", "0.04"),
        ("0.00", "0.02", "0.01"),
        ("0.02", "0.02", "0.02"),
        ("0.00", "0.02", "0.01"),
        ("68.18", "52.01", "60.10"),
        ("67.26", "51.85", "59.56"),
        ("66.00", "50.75", "58.38"),
        ("65.64", "50.32", "57.98"),
        ("66.52", "50.87", "58.70"),
    ),
    ("xvlm", "chita++"): (
        ("0.02", "0.02", "0.02"),
        ("0.00", "0.02", "0.01"),
        ("0.06", "0.02", "0.04"),
        ("61.64", "48.44", "55.04"),
        ("73.80", "58.77", "66.29"),
        ("72.96", "58.22", "65.59"),
        ("73.44", "57.71", "65.58"),
        ("73.12", "57.58", "65.35"),
        ("72.76", "57.33", "65.05"),
    ),
}
"""By model and method: text, image and average R@1 for 1e-5 to 1e3."""


def row(model: str, method: str, value: float) -> tuple[str, str, str]:
    """The paper's figures of a penalty; empty where it has none."""
    for exponent, figures in zip(POWERS, FIGURES[model, method], strict=True):
        if value == float(f"1e{exponent}"):
            return figures
    return "", "", ""


def averages(model: str, method: str) -> dict[float, float]:
    """The paper's average R@1 by penalty."""
    figures = zip(POWERS, FIGURES[model, method], strict=True)
    return {float(f"1e{exponent}"): float(each[2]) for exponent, each in figures}


def best(model: str, method: str) -> float:
    """The penalty that the paper chose."""
    found = averages(model, method)
    return max(found, key=lambda value: found[value])
