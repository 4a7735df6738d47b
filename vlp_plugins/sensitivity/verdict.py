"""What the curves say, in sentences: which modality is fragile, and whether the ID foretells it.

"Intrinsic dimension for VLM pruning" (Wang, Zhang, Ma, ICML 2024) claims that the higher a layer's
ID, the less of it can be pruned, and that vision has the higher ID and is the more fragile.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlp_plugins.sensitivity.curves import Curve, Sensitivity
from vlp_plugins.sensitivity.prunability import apart, prunability_of
from vlp_plugins.sensitivity.ranks import RankCorrelation
from vlp_plugins.sensitivity.relations import ALL, WITHIN, Relation

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
    difference, error = apart(text, vision, found.dense)
    more = "more" if difference > 0 else "less"
    size = f"text is {abs(difference):.3f}{_plus_minus(error)} {more} prunable than vision"
    if error is None:
        verdict = f"not shown, {size}, but one batch gives no error"
    elif abs(difference) <= _ERRORS * error:
        verdict = f"not shown, {size}, which is within the error"
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
                f"{judged(relation.found)}."
            )
    return found


def judged(found: RankCorrelation) -> str:
    """A rank correlation between ID and prunability in words; the claim is that it is negative."""
    if found.rho is None:
        return f"{found.count} groups are too few, or all alike: no correlation can be told"
    text = number_text(found)
    shown = found.p is not None and found.p < _LEVEL and _excludes_zero(found)
    if not shown:
        sign = "the claimed sign" if found.rho < 0 else "the opposite of the claimed sign"
        return (
            f"not shown: {text}, {sign}, but interval and p-value do not both exclude no relation"
        )
    if found.rho < 0:
        return f"holds here: {text}"
    return f"the opposite holds here: {text}"


def number_text(found: RankCorrelation) -> str:
    """`rank correlation -0.61 (95% interval -0.93 to 0.04, p = 0.12)`."""
    if found.rho is None:
        return "no rank correlation"
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"95% interval {found.low:+.2f} to {found.high:+.2f}, "
    p = "" if found.p is None else f"p = {found.p:.2g}"
    return f"rank correlation {found.rho:+.2f} ({interval}{p})"


def _excludes_zero(found: RankCorrelation) -> bool:
    if found.low is None or found.high is None:
        return False
    return found.low > 0 or found.high < 0


def _compared(lowest: Curve, second: Curve, found: Sensitivity) -> str:
    difference, error = apart(second, lowest, found.dense)
    names = f"{lowest.group.title} is the most fragile modality, {second.group.title} the next"
    by = f"they are {difference:.3f}{_plus_minus(error)} apart"
    if error is not None and difference <= _ERRORS * error:
        return f"{names}, but {by}: that is within the error."
    return f"{names}: {by}."


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"
