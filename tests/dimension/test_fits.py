"""The fits, against loops as the papers write them, and what each ratio does to them."""

import math

import pytest
import torch

from vlp_plugins.dimension.twonn import likelihood, slope


def log_ratios(n=200, dimension=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(n, dtype=torch.float64, generator=generator).log() / dimension


def naive_slope(logs, kept):
    x = sorted(logs.tolist())
    top = bottom = 0.0
    for i in range(1, kept + 1):
        y = -math.log(1 - i / len(x))
        top += x[i - 1] * y
        bottom += x[i - 1] ** 2
    return top / bottom


def naive_likelihood(logs, kept):
    x = sorted(logs.tolist())
    return (kept - 1) / (sum(x[:kept]) + (len(x) - kept) * x[kept - 1])


@pytest.mark.parametrize(
    ("fit", "naive", "drop", "kept"),
    [
        (slope, naive_slope, None, 198),
        (slope, naive_slope, 0.1, 180),
        (slope, naive_slope, 0.0, 199),
        (slope, naive_slope, 0.9, 20),
        (likelihood, naive_likelihood, None, 200),
        (likelihood, naive_likelihood, 0.0, 200),
        (likelihood, naive_likelihood, 0.1, 180),
        (likelihood, naive_likelihood, 0.9, 20),
    ],
)
def test_a_fit_is_what_a_loop_gives(fit, naive, drop, kept):
    logs = log_ratios()

    found = fit(logs, drop)

    assert found.kept == kept
    assert found.dimension == pytest.approx(naive(logs, kept), rel=1e-12)
    assert fit(logs.flip(0), drop).dimension == pytest.approx(found.dimension, rel=1e-12)


@pytest.mark.parametrize("drop", [None, 0.1, 0.5])
@pytest.mark.parametrize("fit", [slope, likelihood])
def test_a_fit_finds_the_rate(fit, drop):
    assert fit(log_ratios(20_000, dimension=7.0), drop).dimension == pytest.approx(7, rel=0.05)


@pytest.mark.parametrize("fit", [slope, likelihood])
@pytest.mark.parametrize("drop", [None, 0.1])
def test_influences_say_what_leaving_a_ratio_out_does(fit, drop):
    """The jackknife's pseudo-values, of which they are the limit for many ratios."""
    n = 400
    logs = log_ratios(n)

    found = fit(logs, drop)

    left_out = torch.tensor(
        [fit(torch.cat([logs[:i], logs[i + 1 :]]), drop).dimension for i in range(n)]
    )
    jackknife = (left_out.mean() - left_out).double() * (n - 1)
    assert float(found.influence.sum()) == pytest.approx(0, abs=1e-8)
    assert torch.corrcoef(torch.stack([found.influence, jackknife]))[0, 1] > 0.97
    assert found.influence.std() == pytest.approx(float(jackknife.std()), rel=0.12)


@pytest.mark.parametrize(
    ("fit", "drop", "variance"),
    [(slope, None, 1.25), (likelihood, None, 1.0), (likelihood, 0.1, 1 / 0.9)],
)
def test_influences_add_up_to_the_known_variance(fit, drop, variance):
    """Of independent exponential ratios: d^2 / n, times 5/4 for the slope, 1 / kept if censored."""
    found = fit(log_ratios(100_000, dimension=3.0), drop)

    assert float(found.influence.square().mean()) == pytest.approx(9 * variance, rel=0.03)
