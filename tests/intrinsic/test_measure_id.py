"""measure_id(): what a user writes."""

from __future__ import annotations

import pytest
import torch
from naive_points import naive_points
from toy import ToyAdapter, toy_batches, toy_model

from vlp_plugins import measure_id
from vlp_plugins.errors import UnclaimedModelError, UnsupportedError
from vlp_plugins.intrinsic.estimate import Estimator
from vlp_plugins.intrinsic.twonn import estimate
from vlp_plugins.statistics.base import Site

BATCHES = toy_batches(14)


def test_every_layer_has_the_dimension_of_its_points():
    profile = measure_id(toy_model(), BATCHES, adapter=ToyAdapter(), memory_budget="1GiB")
    points = naive_points(toy_model(), ToyAdapter(), BATCHES)
    assert len(profile.layers) == len(points)
    for layer in profile.layers:
        found = estimate(points[Site(layer.weight, layer.stream, layer.owner)])
        assert layer.dimension == pytest.approx(found.dimension, rel=1e-4)
        assert layer.error == pytest.approx(found.error, rel=1e-3)


def test_the_published_variant_has_the_published_padding_and_blocks():
    estimator = Estimator(blocks=2)
    profile = measure_id(
        toy_model(), BATCHES, adapter=ToyAdapter(), variant="published", estimator=estimator
    )
    assert profile.settings["published"] is True
    points = naive_points(toy_model(), ToyAdapter(), BATCHES, padding="published")
    for layer in profile.layers:
        found = estimate(points[Site(layer.weight, layer.stream, layer.owner)], estimator)
        assert layer.dimension == pytest.approx(found.dimension, rel=1e-4)
    with pytest.raises(UnsupportedError, match="variant 'publisht'"):
        measure_id(toy_model(), BATCHES, adapter=ToyAdapter(), variant="publisht")


def test_padding_may_be_chosen_apart_from_the_variant():
    options = {"adapter": ToyAdapter(), "estimator": Estimator()}
    for padding in ("real", "published"):
        profile = measure_id(toy_model(), BATCHES, padding=padding, variant="published", **options)
        assert profile.settings["padding"] == padding


def test_names_of_dtypes_and_amounts_of_memory(tmp_path):
    profile = measure_id(
        toy_model(), BATCHES, adapter=ToyAdapter(), dtype="bfloat16", limit=10,
        workplace=str(tmp_path),
    )  # fmt: skip
    assert profile.settings["dtype"] == "bfloat16"
    assert profile.settings["samples"] == 30
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    with pytest.raises(UnsupportedError, match="dtype 'int8'"):
        measure_id(toy_model(), BATCHES, adapter=ToyAdapter(), dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="'much' is no amount of memory"):
        measure_id(toy_model(), BATCHES, adapter=ToyAdapter(), memory_budget="much")


def test_a_model_that_nobody_claims_is_told():
    with pytest.raises(UnclaimedModelError):
        measure_id(toy_model(), BATCHES)
