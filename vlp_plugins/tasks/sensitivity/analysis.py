"""What follows from the curves: prunability, relations, sentences and charts.

"Intrinsic dimension for VLM pruning" (Wang, Zhang, Ma, ICML 2024) claims that the higher a layer's
ID, the less of it can be pruned, and that vision has the higher ID and is the more fragile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlp_plugins.dimension.profile import LayerDimension
from vlp_plugins.report.dimensions import vision_sentences as vision_dimensions
from vlp_plugins.report.drawing import Axis, Chart, Point, line_chart
from vlp_plugins.tasks.sensitivity.curves import (
    TOLERANCE,
    Curve,
    Group,
    Prunability,
    Sensitivity,
    difference_of,
    prunabilities,
    prunability_of,
)
from vlp_plugins.tasks.sensitivity.relations import (
    ALL,
    WITHIN,
    RankCorrelation,
    Relation,
    relations,
)

_ERRORS = 2.0
"""A difference of so many standard errors counts as one."""
_LEVEL = 0.05


def modality_sentences(found: Sensitivity) -> list[str]:
    """Which modality is the most fragile, and by how much; nothing for fewer than two.

    Each modality is pruned alone, at the same fractions of its own weights.
    """
    curves = found.of("modality")
    if len(curves) < 2:
        return []
    numbers = {curve.group.title: prunability_of(curve, found.dense) for curve in curves}
    ranked = sorted(curves, key=lambda curve: numbers[curve.group.title].loss)
    listed = ", ".join(
        f"{title} {each.loss:.3f}{_plus_minus(each.error)}" for title, each in numbers.items()
    )
    sentences = [
        f"Prunability by the loss (1: pruning changes nothing): {listed}.",
        _compared(ranked[0], ranked[1], found),
    ]
    recalls = {title: each.recall for title, each in numbers.items() if each.recall is not None}
    if recalls:
        listed = ", ".join(f"{title} {recall:.3f}" for title, recall in recalls.items())
        sentences.append(f"Prunability by R@1: {listed}.")
    return sentences


def vision_sentences(found: Sensitivity) -> list[str]:
    """Whether vision is more fragile than text; nothing unless both were measured."""
    by_title = {curve.group.title: curve for curve in found.of("modality")}
    if not {"vision", "text"} <= by_title.keys():
        return []
    vision, text = by_title["vision"], by_title["text"]
    difference, error = difference_of(text, vision, found.dense)
    more = "more" if difference > 0 else "less"
    size = f"text is {abs(difference):.3f}{_plus_minus(error)} {more} prunable than vision"
    if error is None:
        verdict = f"not shown, {size}, but one batch gives no error"
    elif abs(difference) <= _ERRORS * error:
        verdict = f"not shown, {size}, less than two standard errors"
    else:
        verdict = f"holds here, {size}" if difference > 0 else f"the opposite holds here, {size}"
    return [f"Vision more fragile than text: {verdict}."]


def relation_sentences(relations: Sequence[Relation]) -> list[str]:
    """Whether a higher ID means less prunable, over all groups and within modalities."""
    found = []
    for relation in relations:
        if relation.by != "ID" or relation.measure != "loss":
            continue
        if relation.scope in (ALL, WITHIN):
            where = "" if relation.scope == ALL else ", within modalities"
            found.append(
                f"Higher ID, less prunable (over {relation.found.count} {relation.level}s{where}): "
                f"{verdict_of(relation.found)}."
            )
    return found


def verdict_of(found: RankCorrelation) -> str:
    """A rank correlation between ID and prunability in words; the claim is that it is negative."""
    if found.rho is None:
        return f"{found.count} groups are too few, or all alike, for a correlation"
    text = number_text(found)
    excludes_zero = (
        found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    )
    if found.p is None or found.p >= _LEVEL or not excludes_zero:
        sign = "the claimed sign" if found.rho < 0 else "the opposite of the claimed sign"
        return (
            f"not shown: {text}, {sign}, but interval and p-value do not both exclude no relation"
        )
    return f"{'holds here' if found.rho < 0 else 'the opposite holds here'}: {text}"


def number_text(found: RankCorrelation) -> str:
    """`rank correlation -0.61 (95% interval -0.93 to 0.04, p = 0.12)`."""
    if found.rho is None:
        return "no rank correlation"
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"95% interval {found.low:+.2f} to {found.high:+.2f}, "
    p = "" if found.p is None else f"p = {found.p:.2g}"
    return f"rank correlation {found.rho:+.2f} ({interval}{p})"


def _compared(lowest: Curve, second: Curve, found: Sensitivity) -> str:
    difference, error = difference_of(second, lowest, found.dense)
    names = f"{lowest.group.title} is the most fragile modality, {second.group.title} the next"
    by = f"they are {difference:.3f}{_plus_minus(error)} apart"
    if error is not None and difference <= _ERRORS * error:
        return f"{names}, but {by}: less than two standard errors."
    return f"{names}: {by}."


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


@dataclass(frozen=True)
class Analysis:
    """What was measured, and what follows.

    Attributes:
        tolerance: rise of the loss that `Prunability.tolerated` allows.
        dimensions: ID by canonical name of the weights; None if it is not known.
        relations: rank correlations with the prunability; empty without dimensions.
    """

    found: Sensitivity
    prunabilities: tuple[Prunability, ...]
    tolerance: float
    dimensions: Mapping[str, float] | None
    relations: tuple[Relation, ...]
    sentences: tuple[str, ...]


def analyse(
    found: Sensitivity,
    dimensions: Mapping[str, float] | None = None,
    layers: Sequence[LayerDimension] = (),
    *,
    tolerance: float = TOLERANCE,
) -> Analysis:
    """Works out the rest from what `sensitivity` measured.

    `dimensions` has the ID by canonical name of the weights (`IdProfile.factors`), and `layers`
    those of the profile that they come from, for a sentence that compares modalities.

    Raises:
        UnsupportedError: if the dense loss is not positive.
    """
    numbers = prunabilities(found, tolerance)
    related = [] if dimensions is None else relations(numbers, dimensions)
    sentences = [
        *modality_sentences(found),
        *vision_sentences(found),
        *vision_dimensions(layers),
        *relation_sentences(related),
    ]
    return Analysis(found, tuple(numbers), tolerance, dimensions, tuple(related), tuple(sentences))


def curves_charts(found: Sensitivity, curves: Sequence[Curve], what: str) -> list[Chart]:
    """Loss over the dense loss, and R@1 if it was measured; one line per curve of a group.

    Points whose loss is not finite are left out. Error bars are standard errors over the batches.
    """
    x = Axis("sparsity of the group", percent=True)
    points = {curve.group.title: [found.dense, *curve.points] for curve in curves}
    charts = [
        line_chart(
            f"{what}: loss",
            {
                title: [
                    (p.sparsity, 1 + p.rise(found.dense), p.rise_error(found.dense))
                    for p in each
                    if 1 + p.rise(found.dense) > 0
                ]
                for title, each in points.items()
            },
            x=x,
            y=Axis("loss / dense loss", log=True),
            note="Logarithmic, with standard errors over the batches.",
        )
    ]
    if found.dense.recall is not None:
        recalls = {
            title: [(p.sparsity, p.recall) for p in each if p.recall is not None]
            for title, each in points.items()
        }
        y = Axis("R@1, mean of both ways (%)", low=0.0)
        charts.append(line_chart(f"{what}: R@1", recalls, x=x, y=y))
    return charts


def relation_chart(
    prunabilities: Sequence[Prunability], dimensions: Mapping[Group, float], what: str
) -> Chart:
    """ID on x, prunability by the loss on y, one point per group, by modality."""
    groups: dict[str, list[Point]] = {}
    for each in prunabilities:
        if each.group not in dimensions:
            continue
        place = (dimensions[each.group], each.loss, each.error)
        groups.setdefault(each.group.modality, []).append(place)
    return line_chart(
        f"ID and prunability of {what}",
        groups,
        x=Axis("intrinsic dimension (mean of the layers)"),
        y=Axis("prunability by the loss"),
        joined=False,
        note="If a higher ID meant less prunable, the points would fall from left to right.",
    )
