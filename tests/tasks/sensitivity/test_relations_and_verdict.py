"""From curves and dimensions to rank correlations and honest sentences."""

from __future__ import annotations

import pytest
from curve_examples import DENSE, curve, found

from vlp_plugins.tasks.sensitivity.analysis import (
    analyse,
    modality_sentences,
    verdict_of,
    vision_sentences,
)
from vlp_plugins.tasks.sensitivity.curves import Group, prunabilities
from vlp_plugins.tasks.sensitivity.relations import (
    RankCorrelation,
    dimensions_of,
    rank_correlation,
    relations,
)

BLOCKS = [f"{modality} {depth}" for modality in ("vision", "text") for depth in range(4)]
STEEPNESS = [2.0, 3.0, 4.0, 5.0, 1.1, 1.2, 1.3, 1.4]


def blocks():
    curves = [curve(b, [1, 1, s]) for b, s in zip(BLOCKS, STEEPNESS, strict=True)]
    return found(*curves)


def dimensions(values):
    return {f"{b} weight": value for b, value in zip(BLOCKS, values, strict=True)}


def test_the_id_of_a_group_is_the_mean_over_its_weights():
    group = Group("vision", "modality", "vision", None, ("a", "b"), 5)
    assert dimensions_of([group], {"a": 3.0, "b": 6.0, "c": 100.0}) == {group: 4.5}


def test_groups_without_a_dimension_are_not_related_to_it():
    known = dimensions(STEEPNESS)
    del known["text 3 weight"]
    related = relations(prunabilities(blocks()), known)
    assert {r.scope: r.found.count for r in related if r.by == "ID"}["all"] == len(BLOCKS) - 1


def test_scopes_measures_and_what_they_are_compared_with():
    numbers = prunabilities(blocks())
    related = relations(numbers, dimensions(STEEPNESS))
    scopes = {(r.by, r.measure, r.scope) for r in related}
    assert scopes == {
        (by, measure, scope)
        for by in ("ID", "elements")
        for measure in ("loss", "recall")
        for scope in ("all", "within modalities", "vision", "text")
    }
    by_scope = {r.scope: r.found for r in related if (r.by, r.measure) == ("ID", "loss")}
    assert by_scope["all"].rho == pytest.approx(-1)  # the steeper, the less prunable
    assert by_scope["vision"].count == 4
    expected = rank_correlation(STEEPNESS, [p.loss for p in numbers])
    assert by_scope["all"] == expected


def test_modalities_are_not_ranked_and_one_modality_has_no_within():
    curves = [curve("vision", [1, 1, 2], "modality")]
    curves += [curve(b, [1, 1, s]) for b, s in zip(BLOCKS[:4], STEEPNESS, strict=False)]
    related = relations(prunabilities(found(*curves)), {"vision weight": 1} | dimensions(STEEPNESS))
    assert {r.level for r in related} == {"block"}
    assert {r.scope for r in related} == {"all"}


@pytest.mark.parametrize(
    ("correlation", "text"),
    [
        (RankCorrelation(9, -0.8, -0.95, -0.4, 0.01), "holds here: rank correlation -0.80 (95%"),
        (RankCorrelation(9, 0.8, 0.4, 0.95, 0.01), "the opposite holds here: rank correlation"),
        (RankCorrelation(7, -0.5, -0.9, 0.4, 0.26), "not shown: .*, the claimed sign, but"),
        (RankCorrelation(7, 0.5, -0.4, 0.9, 0.26), "not shown: .*, the opposite of the claimed"),
        (RankCorrelation(9, -0.8, -0.95, -0.4, 0.2), "not shown"),
        (RankCorrelation(4, -1.0, None, None, 0.083), r"not shown: rank correlation -1.00 \(p ="),
        (RankCorrelation(2, None), "2 groups are too few"),
    ],
)
def test_a_correlation_in_words(correlation, text):
    import re

    assert re.match(text.replace("(95%", r"\(95%"), verdict_of(correlation))


def test_the_most_fragile_modality_is_named_with_the_error():
    clear = found(
        curve("vision", [1, 2, 5], "modality", wobble=0.01),
        curve("text", [1, 1.1, 2], "modality", wobble=0.01),
    )
    first, second, third = modality_sentences(clear)
    assert first.startswith("Prunability by the loss (1: pruning changes nothing): vision 0.")
    assert "vision is the most fragile modality, text the next: they are 0." in second
    assert third.startswith("Prunability by R@1: vision 0.")
    (sentence,) = vision_sentences(clear)
    assert sentence.startswith("Vision more fragile than text: holds here, text is 0.")


def test_a_difference_within_the_error_is_not_a_difference():
    close = found(
        curve("vision", [1, 2, 5], "modality", wobble=0.8),
        curve("text", [1, 2.01, 5], "modality"),
    )
    assert modality_sentences(close)[1].endswith(" apart: less than two standard errors.")
    assert "not shown" in vision_sentences(close)[0]


def test_the_other_way_round_is_said():
    other = found(
        curve("vision", [1, 1.1, 2], "modality"), curve("text", [1, 2, 5], "modality", wobble=0.01)
    )
    assert "the opposite holds here, text is" in vision_sentences(other)[0]
    assert "less prunable than vision" in vision_sentences(other)[0]


def test_other_modalities_have_no_sentence_about_vision():
    assert vision_sentences(found(curve("image", [1, 1, 1], "modality"))) == []
    assert modality_sentences(found(curve("image", [1, 1, 1], "modality"))) == []


def test_without_dimensions_nothing_is_said_of_them():
    analysis = analyse(blocks())
    assert analysis.relations == ()
    assert analysis.sentences == ()
    assert DENSE.loss == 1.5


def test_with_dimensions_the_verdicts_follow():
    sentences = analyse(blocks(), dimensions(STEEPNESS)).sentences
    assert sentences[0].startswith("Higher ID, less prunable (over 8 blocks): holds here: ")
    assert sentences[1].startswith("Higher ID, less prunable (over 8 blocks, within modalities): ")
