"""ViT computes what the published code computed, and names its weights as that code does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTConfig

from benchmarks.parity.vit import config_from_golden, model_from_golden
from vlp_adapters.vit import ViTAdapter
from vlp_plugins.models.weights import WeightMap

GOLDEN = Path(__file__).parents[1] / "golden" / "vit"
OUTPUTS = json.loads((GOLDEN / "outputs.json").read_text())
SUMMARY = json.loads((GOLDEN / "summary.json").read_text())
ADAPTER = ViTAdapter()


def golden_config() -> ViTConfig:
    return config_from_golden(GOLDEN)


def golden_batch(index: int) -> dict[str, Tensor]:
    stacked = load_file(GOLDEN / "batches.safetensors")
    return {"pixel_values": stacked["image"][index], "labels": stacked["labels"][index]}


@pytest.fixture(scope="module")
def golden() -> nn.Module:
    return model_from_golden(GOLDEN)


@torch.no_grad()
def test_computes_the_published_hidden_states_and_logits(golden: nn.Module) -> None:
    expected = load_file(GOLDEN / "outputs.safetensors")
    pixels = golden_batch(0)["pixel_values"]
    hidden = golden.get_submodule("vit")(pixel_values=pixels).last_hidden_state
    logits = golden(pixel_values=pixels).logits
    torch.testing.assert_close(hidden, expected["last_hidden_state"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("index", range(6))
def test_computes_the_published_loss_of_every_batch(golden: nn.Module, index: int) -> None:
    losses = ADAPTER.losses(golden, golden_batch(index))
    assert list(losses) == ["ce"]
    assert losses["ce"].item() == pytest.approx(
        OUTPUTS["sequence"][index]["losses"]["ce"], abs=1e-5
    )


def test_prunes_what_the_published_code_prunes_in_its_order(golden: nn.Module) -> None:
    weights = WeightMap.of(golden, ADAPTER)
    originals = [ADAPTER.original_name(weight.aliases[0]) for weight in weights.values()]
    assert originals == SUMMARY["prunable_parameters"]
    assert len(originals) == 18
    shapes = SUMMARY["prunable_shapes"]
    assert [list(weight.shape) for weight in weights.values()] == [shapes[n] for n in originals]
    assert weights.numel == 24_576


def test_original_names_are_those_of_the_whole_published_state(golden: nn.Module) -> None:
    names = {ADAPTER.original_name(path) for path in golden.state_dict()}
    assert names == set(load_file(GOLDEN / "model.safetensors"))


def test_the_probe_is_one_stream_of_real_tokens(golden: nn.Module) -> None:
    (stream,) = ADAPTER.streams(golden, golden_batch(0))
    assert stream.name == "vision"
    assert stream.real == {"vision": None}
