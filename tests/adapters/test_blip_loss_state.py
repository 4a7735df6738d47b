"""What BLIP's losses change beside gradients: restored, and advanced without losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from blip_modeling_examples import tiny_batch, tiny_config
from torch import Tensor

from vlp_adapters.blip import BlipForPretraining
from vlp_adapters.blip.adapter import BlipAdapter
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError

ADAPTER = BlipAdapter()


@pytest.fixture
def model() -> BlipForPretraining:
    torch.manual_seed(0)
    model = BlipForPretraining(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # twins that differ from the online networks
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.temp.fill_(0.6)  # above its bound
    return model


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """More pairs than the queue of 12 has room for."""
    made = []
    for index in range(count):
        batch = tiny_batch()
        batch["pixel_values"] = batch["pixel_values"] + index
        made.append(batch)
    return made


def snapshot(model: Any) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("published", [False, True])
def test_advancing_changes_the_state_as_losses_do_bit_by_bit(model, published):
    other = copy.deepcopy(model)
    before = snapshot(model)
    for batch in batches():
        ADAPTER.losses(model, batch, published=published)
        ADAPTER.advance(other, batch, published=published)
        assert different(snapshot(model), snapshot(other)) == set()
    assert "image_queue" in different(snapshot(model), before)


def test_the_loss_state_is_all_that_losses_change(model):
    before = snapshot(model)
    state = ADAPTER.loss_state(model)
    kept = [tensor.detach().clone() for tensor in state]
    for batch in batches(2):
        ADAPTER.losses(model, batch)
    changed = different(snapshot(model), before)
    assert {"image_queue", "text_queue", "queue_ptr", "temp", "vision_proj_m.weight"} <= changed
    assert all("_m." in name or name in {"image_queue", "text_queue", "queue_ptr", "temp"}
               for name in changed)  # fmt: skip
    with torch.no_grad():
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
    assert different(snapshot(model), before) == set()


def test_no_prunable_weight_is_part_of_the_state(model):
    prunable = {id(weight.parameter) for weight in WeightMap.of(model, ADAPTER).values()}
    assert not prunable & {id(tensor) for tensor in ADAPTER.loss_state(model)}


def test_published_losses_leave_the_momentum_projections_behind(model):
    before = snapshot(model)
    ADAPTER.losses(model, batches(1)[0], published=True)
    changed = different(snapshot(model), before)
    assert not any("proj_m." in name for name in changed)
    assert any("vision_model_m." in name for name in changed)
    assert any("text_encoder_m." in name for name in changed)


def test_a_sample_with_nan_stays_out_of_the_queues(model):
    bad = batches(1)[0]
    bad["pixel_values"][1, 0, 0, 0] = torch.nan
    column = model.image_queue[:, 1].clone()
    losses = ADAPTER.losses(model, bad)
    assert torch.isnan(losses["itc"]), "the losses show it"
    assert torch.equal(model.image_queue[:, 1], column)
    assert torch.isfinite(model.image_queue).all()
    assert all(torch.isfinite(loss) for loss in ADAPTER.losses(model, batches(1)[0]).values())


def test_a_probe_leaves_the_state_as_it_was_and_advances_it_inside(model):
    before = snapshot(model)
    probe = LossProbe(model, ADAPTER, WeightMap.of(model, ADAPTER))
    one, two = batches(2)
    with probe.attached(["vision.0.attention.qkv"]):
        probe.measure(one, 0)
        expected = dict(probe.measure(two, 1) or {})
        middle = snapshot(model)
    assert different(snapshot(model), before) == set()
    with probe.attached(["vision.0.attention.qkv"]):
        probe.advance(one, 0)
        found = probe.measure(two, 1)
        assert different(snapshot(model), middle) == set()
        assert found
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_batch_of_one_is_refused_as_by_the_losses(model):
    with pytest.raises(BatchError):
        ADAPTER.advance(model, {key: value[:1] for key, value in batches(1)[0].items()})


def test_downstream_models_have_no_state():
    from transformers import BlipForImageTextRetrieval
    from transformers.models.blip.configuration_blip import BlipConfig

    from vlp_adapters.blip.kinds import kind_of
    from vlp_adapters.kinds import Kind

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = BlipConfig(
        text_config={**sizes, "vocab_size": 30}, vision_config={**sizes, "image_size": 16,
        "patch_size": 8},
    )  # fmt: skip
    retrieval = BlipForImageTextRetrieval(config)
    assert kind_of(retrieval) is Kind.RETRIEVAL
    assert ADAPTER.loss_state(retrieval) == []
    ADAPTER.advance(retrieval, {})
