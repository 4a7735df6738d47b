"""One point per sample: its tokens, then zeros, however batches and buffers came about."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from vlp_plugins.calibration.outputs import RealTokens
from vlp_plugins.dimension.points import Points
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

FEATURES = 3


def calls_of(lengths: list[list[int]], sizes: list[int], seed: int) -> list[list[torch.Tensor]]:
    """By batch and call random tokens `[size, length, FEATURES]`."""
    rng = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(size, length, FEATURES, generator=rng) for length in by_call]
        for size, by_call in zip(sizes, lengths, strict=True)
    ]


def filled(batches: list[list[torch.Tensor]], rows: int, widths: tuple[int, ...] = ()) -> Points:
    points = Points(widths, rows, torch.float32, torch.device("cpu"))
    for index, calls in enumerate(batches):
        for call, tokens in enumerate(calls):
            width = tokens.shape[1] * FEATURES
            if not points.fits(call, len(tokens), width):
                blocks = [*points.widths, *(0,) * (call + 1 - len(points.widths))]
                blocks[call] = max(blocks[call], width)
                points.grow(blocks, max(points.rows, points.count + len(tokens)))
            points.write(call, tokens)
        points.finish(index)
    return points


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    rows=st.integers(1, 10),
)
def test_points_are_the_calls_side_by_side_with_zeros_behind_each(batches, rows):
    sizes, lengths = [size for size, _ in batches], [by_call for _, by_call in batches]
    given_calls = calls_of(lengths, sizes, seed=0)
    points = filled(given_calls, rows)
    blocks = []
    for call in range(max(map(len, lengths))):
        samples = [
            sample
            for size, calls in zip(sizes, given_calls, strict=True)
            for sample in (calls[call] if call < len(calls) else torch.zeros(size, 0, FEATURES))
        ]
        blocks.append(pad_sequence(samples, batch_first=True).flatten(1))
    assert torch.equal(points.values, torch.cat(blocks, 1))
    assert points.batches == list(enumerate(sizes))


def test_a_batch_comes_back_with_wider_blocks():
    batches = calls_of([[2, 1], [1, 2]], [2, 3], seed=0)
    points = filled(batches, 5)
    wide = points.of_batch(1, (9, 6, 3))
    assert wide.shape == (3, 18)
    assert torch.equal(wide[:, :3], batches[1][0].flatten(1))
    assert torch.equal(wide[:, 9:15], batches[1][1].flatten(1))
    assert not wide[:, 3:9].any()
    assert not wide[:, 15:].any()
    assert torch.equal(points.of_batch(0, points.widths), points.values[:2])


def test_what_stands_at_padding_is_zero_even_if_it_was_nan():
    points = Points((2 * FEATURES,), 1, torch.bfloat16, torch.device("cpu"))
    tokens = torch.tensor([[[1.0, 2, 3], [torch.nan] * 3]])
    written = points.write(0, tokens, torch.tensor([[False, True]]))
    assert written.tolist() == [[1, 2, 3, 0, 0, 0]]
    assert points.dtype == torch.bfloat16
    assert points.nbytes == 2 * 6


TOKENS = torch.arange(24.0).view(2, 4, 3)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 1, 0, 0], [1, 0, 0, 0]], [[0, 1], [0]]),
        ([[0, 0, 1, 1], [0, 1, 1, 1]], [[2, 3], [1, 2, 3]]),
        ([[1, 0, 1, 0], [0, 0, 0, 1]], [[0, 2], [3]]),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [[], []]),
    ],
)
def test_real_tokens_come_first_in_their_order(mask, expected):
    tokens, padding = RealTokens(torch.tensor(mask).bool()).select(TOKENS, "fc")
    assert tokens.shape == (2, max(map(len, expected)), 3)
    for row, kept in enumerate(expected):
        assert torch.equal(tokens[row, : len(kept)], TOKENS[row, kept])
        assert padding[row].tolist() == [False] * len(kept) + [True] * (tokens.shape[1] - len(kept))


def test_one_vector_per_sample_has_no_padding():
    tokens, padding = RealTokens(torch.tensor([[True, False]])).select(torch.ones(1, 5), "pooler")
    assert tokens.shape == (1, 1, 5)
    assert padding is None


def test_masks_that_do_not_fit_are_told():
    with pytest.raises(BatchError, match=r"output of fc is \[2, 4, 3\].*mask.* \[2, 5\]"):
        RealTokens(torch.ones(2, 5).bool()).select(TOKENS, "fc")
    with pytest.raises(UnsupportedError, match="must give bool"):
        RealTokens(torch.ones(2, 4))
