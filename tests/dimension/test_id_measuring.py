"""What is measured: the outputs of every layer, in every stream, one point per sample."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_points import measured, naive_points
from torch import Tensor, nn
from toy import Toy, ToyAdapter, toy_batches, toy_model

from benchmarks.parity.family import Family
from vlp_plugins.calibration.moments import Site
from vlp_plugins.dimension.measure import measure
from vlp_plugins.models.adapter import Stream
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import (
    BatchError,
    DataError,
    NonFiniteError,
    StatisticsError,
    UnsupportedError,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_same_points(found: dict[Site, Tensor], expected: dict[Site, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for site, points in expected.items():
        assert found[site].shape == points.shape, site
        assert torch.allclose(found[site], points, rtol=1e-4, atol=1e-5), site


@pytest.mark.parametrize("padding", ["real", "published"])
def test_the_points_are_those_of_a_loop_that_stores_everything(padding):
    profile, points = measured(toy_model(), ToyAdapter(), toy_batches(4), padding=padding)
    expected = naive_points(toy_model(), ToyAdapter(), toy_batches(4), padding=padding)
    assert_same_points(points, expected)
    for layer in profile.layers:
        shape = expected[Site(layer.weight, layer.stream, layer.owner)].shape
        assert (layer.points, layer.ambient) == shape


@pytest.mark.parametrize("padding", ["real", "published"])
@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_the_points_of_recorded_models(family, padding):
    recorded = Family(GOLDEN / family)
    adapter = registry().adapter_for(recorded.model())
    batches = recorded.batches()[:3]
    _, points = measured(recorded.model(), adapter, batches, padding=padding)
    expected = naive_points(recorded.model(), adapter, batches, padding=padding)
    assert_same_points(points, expected)


def test_a_layer_is_described_by_its_weight_and_its_module():
    profile, _ = measured(toy_model(), ToyAdapter(), toy_batches(2))
    (layer,) = [layer for layer in profile.layers if layer.weight == "cross.1.k"]
    assert (layer.stream, layer.owner, layer.module) == ("text", 0, "cross.1.k")
    assert (layer.modality, layer.depth, layer.ambient, layer.points) == ("text", 1, 24, 6)
    weights = WeightMap.of(toy_model(), ToyAdapter())
    assert list(dict.fromkeys(layer.weight for layer in profile.layers)) == list(weights)
    assert profile.structure == weights.structure
    assert profile.adapter == "toy"
    assert profile.settings["padding"] == "real"
    assert profile.settings["samples"] == 6
    assert profile.settings["batches"] == 2


def test_a_tied_weight_has_a_dimension_for_each_module_that_uses_it():
    profile, points = measured(toy_model(), ToyAdapter(), toy_batches(2))
    tied = [layer for layer in profile.layers if layer.weight == "text.out_proj"]
    assert [(layer.stream, layer.owner, layer.module) for layer in tied] == [
        ("text", 0, "encoder_out"),
        ("decoder", 1, "decoder_out"),
    ]
    assert not torch.equal(
        points[Site("text.out_proj", "text", 0)], points[Site("text.out_proj", "decoder", 1)]
    )


def cut(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some samples of a batch, padded to the longest among them."""
    part = {key: value[rows] for key, value in batch.items()}
    longest = int(part["attention_mask"].sum(1).max())
    return part | {key: part[key][:, :longest] for key in ("input_ids", "attention_mask")}


class Separate(ToyAdapter):
    """The text alone: in the toy, attention does not leave padding out, as real models do."""

    def weights(self, model: nn.Module):
        for spec in super().weights(model):
            if spec.name in ("text.q", "vision.q", "text.out_proj"):
                yield spec

    def streams(self, model: Toy, batch, *, published=False):
        mask = batch["attention_mask"].bool()
        words = model.words(batch["input_ids"])
        pixels = batch["pixel_values"]
        yield Stream("vision", lambda: model.see(pixels), {"image": None})
        yield Stream("text", lambda: model.text.q(words), {"text": mask})
        yield Stream("decoder", lambda: model.write(batch["input_ids"]), {"text": mask})


def test_points_do_not_depend_on_how_samples_were_put_into_batches():
    whole = toy_batches(1, size=12)
    cuts = [slice(0, 1), slice(1, 5), slice(5, 7), slice(7, 12)]
    parts = [cut(whole[0], rows) for rows in cuts]
    _, expected = measured(toy_model(), Separate(), whole)
    _, found = measured(toy_model(), Separate(), parts)
    assert_same_points(found, expected)


def test_texts_that_are_padded_on_the_left_or_to_a_fixed_length_give_the_same_points():
    batch = toy_batches(1, size=6)[0]
    longer = dict(batch)
    moved = dict(batch)
    for key in ("input_ids", "attention_mask"):
        longer[key] = torch.cat([batch[key], torch.zeros(6, 9, dtype=torch.long)], 1)
        rows = zip(batch[key], batch["attention_mask"].sum(1).tolist(), strict=True)
        moved[key] = torch.stack([torch.cat([row[n:], row[:n]]) for row, n in rows])
    _, expected = measured(toy_model(), Separate(), [batch])
    for other in (longer, moved):
        _, found = measured(toy_model(), Separate(), [other])
        assert_same_points(found, expected)


def test_the_model_and_the_random_state_are_as_they_were():
    model = toy_model()
    model.train()
    model.text.eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measured(model, ToyAdapter(), toy_batches(2))
    bad = toy_batches(2)
    bad[1]["pixel_values"] = bad[1]["pixel_values"] * math.nan
    with pytest.raises(NonFiniteError):
        measured(model, ToyAdapter(), bad)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_dtype_is_that_of_the_outputs_unless_another_is_asked_for():
    _, points = measured(toy_model(), ToyAdapter(), toy_batches(2))
    assert {p.dtype for p in points.values()} == {torch.float32}
    _, halves = measured(toy_model(), ToyAdapter(), toy_batches(2), dtype=torch.bfloat16)
    for site, value in halves.items():
        assert torch.equal(value, points[site].bfloat16())
    batches = [
        {key: v.bfloat16() if v.is_floating_point() else v for key, v in batch.items()}
        for batch in toy_batches(2)
    ]
    _, own = measured(toy_model().bfloat16(), ToyAdapter(), batches)
    assert {p.dtype for p in own.values()} == {torch.bfloat16}


def test_batches_of_different_kinds_give_each_layer_the_samples_that_reached_it():
    class Alternating(Separate):
        def streams(self, model, batch, *, published=False):
            kept = ("vision",) if batch["pixel_values"].any() else ("text", "decoder")
            return (s for s in super(type(self), self).streams(model, batch) if s.name in kept)

    batches = toy_batches(5)
    for index in (0, 2, 3):
        batches[index]["pixel_values"] *= 0
    expected = naive_points(toy_model(), Alternating(), batches)
    _, points = measured(toy_model(), Alternating(), batches)
    assert_same_points(points, expected)
    assert len(points[Site("vision.q", "vision", 0)]) == 6
    assert len(points[Site("text.q", "text", 0)]) == 9


class Net(nn.Module):
    """Whatever a `ModuleAdapter` may meet."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 2, stride=2)
        self.mix = nn.Linear(4, 5)
        self.pool = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)  # [B, 4, 4, 4]
        x = self.mix(x.permute(0, 2, 3, 1))  # [B, 4, 4, 5]
        return self.pool(x.mean((1, 2)))  # [B, 6]


def test_any_module_maps_and_vectors_are_points_too():
    torch.manual_seed(0)
    model = Net()
    batches = [torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8)]
    _, points = measured(model, ModuleAdapter(model), batches)
    images = torch.cat(batches)
    maps = model.patch(images)
    mixed = model.mix(maps.permute(0, 2, 3, 1))
    expected = {
        Site("patch", "forward", 0): maps.permute(0, 2, 3, 1).flatten(1),
        Site("mix", "forward", 0): mixed.flatten(1),
        Site("pool", "forward", 0): model.pool(mixed.mean((1, 2))),
    }
    assert_same_points(points, expected)


class Folding(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.patch(x).permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize(
    ("batches", "options", "error", "words"),
    [
        ([], {}, DataError, ["the calibration data is empty"]),
        (toy_batches(1)[0], {}, DataError, ["a single batch"]),
        (toy_batches(1), {"limit": 0}, DataError, ["limit=0"]),
        (toy_batches(1), {"padding": "none"}, UnsupportedError, ["padding 'none'", "published"]),
        (toy_batches(1), {"resume": True}, StatisticsError, ["workplace"]),
    ],
)
def test_wrong_inputs_are_told(batches, options, error, words):
    with pytest.raises(error) as caught:
        measured(toy_model(), ToyAdapter(), batches, **options)
    assert all(word in str(caught.value) for word in words)


def test_layers_that_rearrange_samples_are_told():
    model = Folding()
    with pytest.raises(
        BatchError, match=r"output of mix is \[48, 5\], but the batch has 3 samples"
    ):
        measured(model, ModuleAdapter(model), [torch.rand(3, 3, 8, 8)])


def test_a_layer_that_no_stream_runs_is_told():
    model = Folding()
    with pytest.raises(StatisticsError, match="ran weight 'pool'"):
        measured(model, ModuleAdapter(model, exclude="mix"), [torch.rand(3, 3, 8, 8)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_names_the_batch_and_the_layer(value):
    batches = toy_batches(4)
    batches[2]["pixel_values"][1] = value
    with pytest.raises(NonFiniteError) as caught:
        measured(toy_model(), ToyAdapter(), batches)
    message = str(caught.value)
    assert "the output of patch (weight 'vision.patch', stream 'vision')" in message
    assert "in batch 2" in message


def test_nan_at_padding_is_nothing_to_worry_about():
    class Poisoned(Separate):
        def streams(self, model, batch, *, published=False):
            mask = batch["attention_mask"].bool()
            words = model.words(batch["input_ids"]).masked_fill(~mask[..., None], math.nan)
            for stream in super(type(self), self).streams(model, batch):
                poisoned = stream.name == "text"
                yield (
                    Stream("text", lambda: model.text.q(words), stream.real)
                    if poisoned
                    else (stream)
                )

    _, points = measured(toy_model(), Poisoned(), toy_batches(3))
    assert_same_points(points, naive_points(toy_model(), Separate(), toy_batches(3)))
    with pytest.raises(NonFiniteError, match=r"text\.q"):
        measured(toy_model(), Poisoned(), toy_batches(3), padding="published")


def test_an_error_of_the_estimator_names_the_layer():
    weights = WeightMap.of(toy_model(), ToyAdapter())
    with pytest.raises(StatisticsError, match=r"patch \(weight 'vision.patch', stream 'vision'\)"):
        measure(toy_model(), ToyAdapter(), weights, toy_batches(1))


def test_progress_counts_the_batches_of_all_passes(caplog):
    seen: list[Any] = []
    with caplog.at_level(logging.INFO, "vlp_plugins.dimension"):
        measured(
            toy_model(), ToyAdapter(), toy_batches(3), progress=lambda *done: seen.append(done)
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "20 layers" in caplog.text
