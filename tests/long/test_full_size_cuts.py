"""CLIP ViT-B/16 and BLIP base for retrieval: real sizes, random weights, half of every block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.speed.latency import full_size, halved, random_batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.structured.check import check_equal, outputs
from vlp_plugins.structured.cuts import cut, masked, prepare
from vlp_plugins.structured.files import rebuild, save_structured

pytestmark = pytest.mark.long

PARAMETERS = {"clip": 149_620_737, "blip": 223_452_418}


def removed(family: str) -> int:
    """Half of the rows of queries, keys, values and units with their biases, half of columns."""

    def attention(width: int) -> int:
        return 4 * width * width // 2 + 3 * width // 2

    def units(width: int) -> int:
        return 2 * width * 4 * width // 2 + 4 * width // 2

    vision = attention(768) + units(768)
    text = attention(512) + units(512) if family == "clip" else 2 * attention(768) + units(768)
    return 12 * (vision + text)


@pytest.mark.parametrize("family", PARAMETERS)
def test_half_of_a_full_size_model(family: str, tmp_path: Path) -> None:
    model = full_size(family)
    adapter = registry().adapter_for(model)
    batch = random_batch(family, 2)
    batch["attention_mask"][1, 12:] = 0
    if family == "clip":
        batch["input_ids"][1, 11] = 49407
    fused = outputs(model, adapter, batch)
    prepare(model, adapter)
    check_equal(fused, outputs(model, adapter, batch))
    size = sum(parameter.numel() for parameter in model.parameters())
    record = halved(model, adapter)
    with masked(model, adapter, record):
        expected = outputs(model, adapter, batch)

    cut(model, adapter, record)

    found = outputs(model, adapter, batch)
    check_equal(expected, found)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert (size, size - left) == (PARAMETERS[family], removed(family))
    save_structured(model, tmp_path / "model", record, adapter=adapter)
    again, _ = rebuild(tmp_path / "model")
    for name, tensor in outputs(again, adapter, batch).items():
        assert torch.equal(tensor, found[name])
