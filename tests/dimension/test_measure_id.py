"""measure_id(): what a user writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive_points import naive_points
from toy import ToyAdapter, toy_batches, toy_model

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.calibration.moments import Site
from vlp_plugins.dimension.twonn import Estimator, estimate
from vlp_plugins.pruning import measure_id
from vlp_plugins.runtime.errors import UnclaimedModelError, UnsupportedError

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
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
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    with pytest.raises(UnsupportedError, match="dtype 'int8'"):
        measure_id(toy_model(), BATCHES, adapter=ToyAdapter(), dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="'much' is not an amount of memory"):
        measure_id(toy_model(), BATCHES, adapter=ToyAdapter(), memory_budget="much")


def test_a_model_that_nobody_claims_is_told():
    with pytest.raises(UnclaimedModelError):
        measure_id(toy_model(), BATCHES)


def test_copies_in_batches_of_another_size_and_length_are_copies():
    model = model_from_golden(GOLDEN)
    rng = torch.Generator().manual_seed(0)
    batches = []
    for batch in batches_from_golden(GOLDEN)[:4] * 4:
        ids = torch.randint(5, 40, batch["input_ids"].shape, generator=rng)
        pixels = torch.randn(batch["pixel_values"].shape, generator=rng)
        batches.append({**batch, "input_ids": ids, "pixel_values": pixels})
    first = batches[0]
    longer = {
        name: value if name == "pixel_values" else torch.nn.functional.pad(value, (0, 9))
        for name, value in first.items()
    }
    others = [{name: value[rows] for name, value in longer.items()} for rows in ([0], [1, 2, 3])]

    exact = measure_id(model, [*batches, first])
    found = measure_id(model, [*batches, *others])

    assert sum(map(len, (b["input_ids"] for b in others))) == len(first["input_ids"])
    assert {layer.duplicates for layer in exact.layers} == {2 * len(first["input_ids"])}
    for one, other in zip(found.layers, exact.layers, strict=True):
        assert one.dimension == pytest.approx(other.dimension, rel=1e-3), one.weight
        assert one.duplicates == other.duplicates
