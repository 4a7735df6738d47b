"""The latency benchmark on tiny models: what it counts, and what it says of the target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from benchmarks.speed.latency import cpu_times, halved, multiply_adds, ratios, show, sizes
from vlp_plugins.models.discovery import registry
from vlp_plugins.structured.cuts import cut

WIDTH, UNITS, LAYERS, TOKENS = 16, 32, 2, 6


def tiny() -> CLIPModel:
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": UNITS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "projection_dim": 8,
    }
    vision = tower | {"image_size": 16, "patch_size": 8}
    text = tower | {"vocab_size": 50, "max_position_embeddings": TOKENS, "eos_token_id": 49}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return CLIPModel(config).eval().requires_grad_(False)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.full((1, TOKENS), 49)
    pixels = torch.zeros(1, 3, 16, 16)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def layer(tokens: int, inner: int, units: int) -> int:
    """Multiply-adds of four projections, two products of attention, and two layers of units."""
    return tokens * (4 * WIDTH * inner + 2 * tokens * inner + 2 * WIDTH * units)


def test_multiply_adds_are_those_of_the_formula() -> None:
    model = tiny()
    outside = 4 * 3 * 8 * 8 * WIDTH + 2 * WIDTH * 8 + 8  # patches, projections, similarity
    whole = LAYERS * (layer(5, WIDTH, UNITS) + layer(TOKENS, WIDTH, UNITS)) + outside
    assert multiply_adds(model, batch()) == whole
    adapter = registry().adapter_for(model)
    cut(model, adapter, halved(model, adapter))
    half = LAYERS * (layer(5, WIDTH // 2, UNITS // 2) + layer(TOKENS, WIDTH // 2, UNITS // 2))
    assert multiply_adds(model, batch()) == half + outside


def test_every_model_has_its_times_and_sizes() -> None:
    models: dict[str, Any] = {"dense": tiny(), "structured": tiny()}
    models["structured"].text_model.embeddings.token_embedding.weight.zero_()
    times = cpu_times(models, batch(), rounds=2)
    assert times.keys() == models.keys()
    assert all(0 < each["least_ms"] <= each["median_ms"] for each in times.values())
    assert ratios(times, "median_ms")["dense"] == 1
    found = sizes(models, batch())
    assert found["dense"]["parameters"] == found["structured"]["parameters"]
    assert found["structured"]["nonzero"] < found["dense"]["nonzero"]


@pytest.mark.parametrize(("share", "met"), [(0.5, True), (0.6, False)])
def test_the_target_is_judged_by_every_batch_size(
    share: float, met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def times(structured: float) -> dict[str, dict[str, float]]:
        both = {"dense": 100.0, "structured": 100.0 * structured}
        return {name: {"median_ms": ms, "least_ms": ms} for name, ms in both.items()}

    size = {"parameters": 2e6, "nonzero": 1e6, "bytes": 8e6, "macs": 1e9}
    figures = {
        "rounds": 3,
        "sizes": {"dense": size, "structured": size},
        "cpu": {"1": times(0.5), "8": times(share)},
    }
    assert show("clip", figures) is met
    assert ("NO" in capsys.readouterr().out) is not met
