"""How answers are compared, and how many people have to agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.runtime.errors import DataError
from vlp_plugins.tasks.vqa import normal_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red  Ball.", "red ball"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("a an the", ""),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alldve", "y'alldve"),
        ("lets go", "lets go"),
        ("somebody'd", "somebodyd"),
        ("oclock", "o'clock"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("yes!", "yes"),
        ("yes! sir", "yes sir"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),
        ("2.5", "2.5"),
        ("2.", "2"),
        ("st. john", "st john"),
        ("left\nright", "left right"),
        ("(a) b", "b"),
    ],
)
def test_answers_are_made_comparable(answer: str, normal: str) -> None:
    assert normal_answer(answer) == normal


def test_only_so_many_periods_vanish_as_in_the_official_code() -> None:
    assert normal_answer("." * 40) == "." * 8


def naive(found: str, said: list[str]) -> float:
    """The definition: all subsets of all but one."""
    shares = []
    for left_out in range(len(said)):
        others = [answer for place, answer in enumerate(said) if place != left_out]
        shares.append(min(sum(answer == found for answer in others) / 3, 1))
    return 100 * sum(shares) / len(shares)


@given(st.sampled_from("abc"), st.lists(st.sampled_from("abcd"), min_size=2, max_size=12))
@settings(max_examples=200, deadline=None)
def test_accuracy_is_the_mean_over_all_but_one(found: str, said: list[str]) -> None:
    # `x`: an answer alone that normalisation leaves as it is ("a" would be an article).
    found, said = f"x{found}", [f"x{answer}" for answer in said]
    accuracy = vqa_accuracy([found], [said])
    assert accuracy.accuracy == pytest.approx(naive(found, said))


def test_usual_figures_of_ten_answers() -> None:
    def said(agreeing: int) -> list[str]:
        return ["yes"] * agreeing + ["no"] * (10 - agreeing)

    found = [vqa_accuracy(["yes"], [said(n)]).accuracy for n in range(1, 5)]
    assert found == pytest.approx([30, 60, 90, 100])
    all_questions = vqa_accuracy(["yes", "no"], [said(10), said(10)])
    assert (all_questions.accuracy, len(all_questions.by_question)) == (50, 2)
    assert all_questions.by_question == (100, 0)


def test_where_all_agree_answers_are_compared_as_they_stand() -> None:
    assert vqa_accuracy(["Two"], [["two"] * 10]).accuracy == 0
    assert vqa_accuracy(["Two"], [["two"] * 9 + ["three"]]).accuracy == 100


def test_a_single_answer_is_right_or_wrong() -> None:
    found = vqa_accuracy(["The dog.", "cat"], [["dog"], ["a bird"]])
    assert found.by_question == (100, 0)


def test_what_cannot_be_compared_says_so() -> None:
    with pytest.raises(DataError, match="1 answers were found to 2 questions"):
        vqa_accuracy(["yes"], [["yes"], ["no"]])
    with pytest.raises(DataError, match="question 1 has no answers"):
        vqa_accuracy(["yes", "no"], [["yes"], []])
