"""The largest of many scores: an exact number, whatever the chunks, the ties and the threads."""

import pytest
import torch

from vlp_plugins.scoring import threshold as ranking
from vlp_plugins.scoring.threshold import SAMPLED_FROM, top, top_by

MANY = SAMPLED_FROM + 7


def sorted_top(scores, keep):
    """Positions of the `keep` largest; of equal ones the last."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.sort(stable=True).indices[len(scores) - keep :]] = True
    return chosen


def scores_of(kind, p):
    drawn = torch.randn(p, generator=torch.Generator().manual_seed(p)).abs()
    return {
        "distinct": drawn,
        "ties": (8 * drawn).round(),
        "equal": torch.ones(p),
        "infinite": drawn.masked_fill(drawn > 1, -float("inf")),
    }[kind]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "infinite"])
@pytest.mark.parametrize("p", [100, MANY])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.9, 1.0])
def test_the_largest_are_those_of_a_stable_sort(kind, p, share, monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK", p // 5)
    scores, keep = scores_of(kind, p), int(share * p)

    assert torch.equal(top(scores, keep), sorted_top(scores, keep))


def test_threads_share_out_the_chunks_without_changing_the_choice(monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK", MANY // 7)
    scores = scores_of("ties", MANY)
    before = torch.get_num_threads()
    try:
        chosen = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            chosen.append(top_by(lambda some: scores[some].neg(), MANY, MANY // 3, scores.device))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*chosen)
    assert torch.equal(chosen[0], sorted_top(scores.neg(), MANY // 3))
