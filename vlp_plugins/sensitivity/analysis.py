"""All that follows from the curves: prunabilities, relations with the ID, sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlp_plugins.dimension.profile import LayerDimension
from vlp_plugins.report.dimensions import vision_sentences as vision_dimensions
from vlp_plugins.sensitivity.curves import Sensitivity
from vlp_plugins.sensitivity.prunability import TOLERANCE, Prunability, prunabilities
from vlp_plugins.sensitivity.relations import Relation, relations
from vlp_plugins.sensitivity.verdict import modality_sentences, relation_sentences, vision_sentences


@dataclass(frozen=True)
class Analysis:
    """What was measured, and what follows.

    Attributes:
        found: the curves.
        prunabilities: one per curve, in order.
        tolerance: rise of the loss that `Prunability.tolerated` allows.
        dimensions: ID by canonical name of the weights; None if it is not known.
        relations: rank correlations with the prunability; empty without dimensions.
        sentences: the summary.
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
    """Works out the rest.

    Args:
        found: what `sensitivity` measured.
        dimensions: ID by canonical name of the weights (`IdProfile.factors`).
        layers: of the profile that they come from, for a sentence that compares modalities.
        tolerance: see `Prunability`.

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
