"""Scores with their errors, and what can be told apart."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vlp_plugins.jobs.comparison import Cell, Comparison, Score, comparison_table, sentences
from vlp_plugins.jobs.metrics import TaskMetrics
from vlp_plugins.tasks.retrieval import recall_at_k


def measured(values: list[float]) -> TaskMetrics:
    return TaskMetrics({"top1": sum(values) / len(values)}, by_sample={"top1": values})


def compared(figures: dict[str, list[list[float]]], *, lower_is_better: bool = False) -> Comparison:
    """Methods at sparsity 0.5, each with values by run and sample."""
    cells = tuple(
        Cell(name, "0.5", seed, measured(values), 5, 10, {"vision": 0.5}, 0, 0, f"{name}.st")
        for name, runs in figures.items()
        for seed, values in enumerate(runs)
    )
    count = len(cells[0].measured.by_sample["top1"])
    dense = measured([100.0] * count)
    return Comparison("classification", ("top1",), lower_is_better, 20, dense, cells, {})


def test_the_standard_error_is_that_of_the_mean():
    values = [0.0, 100.0, 100.0, 0.0, 100.0]
    score = Score.of(torch.tensor([values], dtype=torch.float64))
    assert score.value == 60
    # sqrt(p (1 - p) / (n - 1)) of a fraction
    assert score.error == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 4))


def test_several_runs_add_the_error_between_them():
    runs = torch.tensor([[10.0, 10.0], [14.0, 14.0]], dtype=torch.float64)
    score = Score.of(runs)
    assert score.value == 12
    assert score.error == pytest.approx(2)  # all samples agree; the means are 10 and 14


def test_a_difference_is_judged_sample_by_sample():
    """Both err on half of the samples: 100 samples alone would tell no 5 points."""
    draw = random.Random(0)
    one = [100.0 * (draw.random() < 0.5) for _ in range(100)]
    better = [100.0 if place < 12 else value for place, value in enumerate(one)]
    scores = [Score.of(torch.tensor([v], dtype=torch.float64)) for v in (better, one)]
    gap = scores[0].value - scores[1].value
    assert 0 < gap < 1.96 * math.hypot(scores[0].error, scores[1].error)
    assert scores[0].differs_from(scores[1])
    assert not scores[0].differs_from(scores[0])


def test_the_error_of_a_difference_covers_what_chance_does():
    """Of differences that are none about 5% are called one."""
    generator = torch.Generator().manual_seed(0)
    called = 0
    for _ in range(400):
        both = torch.rand(2, 200, generator=generator, dtype=torch.float64)
        called += Score.of(both[:1]).differs_from(Score.of(both[1:]))
    assert 8 <= called <= 36


def test_the_verdict_names_the_best_and_those_that_are_as_good():
    best = [100.0, 100.0, 100.0, 100.0, 0.0, 100.0, 100.0, 100.0]
    near = [100.0, 100.0, 100.0, 100.0, 0.0, 100.0, 100.0, 0.0]
    far = [0.0] * 8
    found = compared({"far": [far], "near": [near], "best": [best]})
    verdict = found.verdict("0.5")
    assert (verdict.best, verdict.as_good) == ("best", ("near",))
    assert found.winner("0.5").masks == "best.st"
    first = sentences(found)[0]
    assert "At 50% best has the best top-1: 87.5 ± 12.5; the dense model has 100.0 ± 0.0" in first
    assert "near cannot be told apart from it" in first

    lower = compared({"far": [far], "near": [near], "best": [best]}, lower_is_better=True)
    assert lower.verdict("0.5").best == "far"
    assert "Next is near, 75.0 ± 16.4 worse" in sentences(lower)[0]


def test_what_is_not_finite_is_never_the_best():
    found = compared({"broken": [[math.nan, 1.0]], "fine": [[1.0, 2.0]]})
    assert found.verdict("0.5").best == "fine"
    assert found.verdict("0.5").as_good == ()
    rows = comparison_table(found).rows
    assert ["50%", "broken", " not finite", ""] in rows
    assert len({len(row[2]) for row in rows}) == 1, "flush right"


def test_a_single_sample_tells_nothing_apart():
    found = compared({"a": [[0.0]], "b": [[100.0]]})
    assert found.verdict("0.5").as_good == ("a",)
    assert "100.0 ± ?" in comparison_table(found).rows[0][2]


def test_recalls_by_image_have_the_recalls_as_their_means():
    """Images with 1 to 3 texts; the mean over texts is that of the values by image."""
    torch.manual_seed(0)
    image_of = [0, 0, 0, 1, 2, 2, 3, 4, 4]
    recall = recall_at_k(torch.randn(5, 9), torch.tensor(image_of), ks=(1,))
    by_image, by_text = recall.by_image(image_of)
    assert len(by_image) == len(by_text) == 5
    assert sum(by_image) / 5 == pytest.approx(recall.image_to_text[1])
    assert sum(by_text) / 5 == pytest.approx(recall.text_to_image[1])


def test_texts_of_one_image_are_not_counted_as_independent_samples():
    """Five equal texts per image are worth one: the error is that of the images."""
    torch.manual_seed(1)
    once = torch.randn(40, 40)
    single = recall_at_k(once, ks=(1,)).by_image(range(40))[1]
    image_of = [image for image in range(40) for _ in range(5)]
    # The own texts of an image tie with each other, not with those of others.
    five = recall_at_k(once.repeat_interleave(5, dim=1), torch.tensor(image_of), ks=(1,))
    assert five.by_image(image_of)[1] == single
