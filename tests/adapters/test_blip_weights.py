"""BLIP's weights: names, ties, modalities, exclusions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blip_adapter_examples import ADAPTER, GOLDEN, tiny
from torch import nn
from toy_masks import random_masks

from benchmarks.parity.blip import model_from_golden
from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.blip.convert import state_to_original
from vlp_plugins.masks.published_files import export_published, import_published
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError


def test_a_weight_that_encoder_and_decoder_share_is_one_with_two_owners() -> None:
    weights = WeightMap.of(tiny(), ADAPTER)
    shared = weights["text.0.cross.query"]
    path = "encoder.layer.0.crossattention.self.query"
    assert [owner.module for owner in shared.owners] == [
        f"text_encoder.{path}",
        f"text_decoder.bert.{path}",
    ]
    assert shared.aliases == tuple(owner.path for owner in shared.owners)
    assert list(weights) == [
        *(f"vision.0.{part}" for part in ("attention.qkv", "attention.output")),
        *(f"vision.0.mlp.{part}" for part in ("fc1", "fc2")),
        *(f"text.0.self.{part}" for part in ("query", "key", "value", "output")),
        *(f"text.0.cross.{part}" for part in ("query", "key", "value", "output")),
        *(f"text.0.ffn.{part}" for part in ("fc1", "fc2")),
        *(f"decoder.0.self.{part}" for part in ("query", "key", "value", "output")),
    ]
    assert {name for name, w in weights.items() if len(w.owners) == 2} == {
        name for name in weights if ".cross." in name or ".ffn." in name
    }


def test_modalities_are_vision_and_text_and_cross_attention_reads_image_tokens() -> None:
    weights = WeightMap.of(tiny(), ADAPTER)
    assert list(weights.by_modality()) == ["vision", "text"]
    assert {name for name, w in weights.items() if w.owners[0].tokens == "vision"} == {
        *(weight.name for weight in weights.by_modality()["vision"]),
        "text.0.cross.key",
        "text.0.cross.value",
    }


def test_prunes_what_the_published_code_prunes_in_its_order() -> None:
    weights = WeightMap.of(model_from_golden(GOLDEN), ADAPTER)
    recorded = json.loads((GOLDEN / "distribution.json").read_text())["modality"]
    originals = {ADAPTER.original_name(w.aliases[0]): w.modality for w in weights.values()}
    assert list(originals.items()) == list(recorded.items())
    assert weights.numel == 45_568


def test_blip_base_has_as_many_prunable_weights_as_the_papers_count() -> None:
    with torch.device("meta"):
        model = BlipForPretraining(BlipPretrainConfig.base())
    weights = WeightMap.of(model, ADAPTER)
    assert weights.numel == 226_492_416
    assert len(weights) == 12 * (4 + 10 + 4)


def test_what_is_not_pruned_has_a_reason() -> None:
    found = inspect_model(tiny(), ADAPTER)
    reasons = {group.reason.split(":")[0]: group.example for group in found.excluded}
    assert reasons["momentum copy"] == "vision_model_m.embeddings.class_embedding"
    assert reasons["LM head"].startswith("text_decoder.cls.predictions.")
    assert reasons["projection into the common space"] == "vision_proj.weight"
    assert "ITM head" in reasons
    assert "not declared by the adapter" not in reasons


def test_a_wrapped_layer_is_refused_by_name() -> None:
    model = tiny()
    layer = model.text_decoder.bert.encoder.layer[0].attention.self
    layer.query = nn.Sequential(layer.query)
    with pytest.raises(UnsupportedError, match=r"text_decoder.*query is a Sequential"):
        list(ADAPTER.weights(model))


def test_asking_about_another_model_imports_no_transformers() -> None:
    code = (
        "import sys, torch\n"
        "from vlp_adapters.blip.adapter import BlipAdapter\n"
        "assert not BlipAdapter().claims(torch.nn.Linear(1, 1))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_masks_of_split_attentions_are_those_of_the_originals_one_matrix(tmp_path: Path) -> None:
    model = tiny()
    names = state_to_original(model).keys()
    ADAPTER.split_fused(model)
    masks = random_masks(model, adapter=ADAPTER)
    weights = WeightMap.of(model, ADAPTER)
    export_published(masks, tmp_path / "masks.pth", weights, ADAPTER)
    written = torch.load(tmp_path / "masks.pth", weights_only=True)
    assert {key.removesuffix("_pruning_mask") for key in written} <= names
    qkv = written["visual_encoder.blocks.0.attn.qkv.weight_pruning_mask"]
    third = [masks[f"vision.0.attention.{part}"] for part in ("query", "key", "value")]
    assert torch.equal(qkv, torch.cat(third).float())
    assert import_published(tmp_path / "masks.pth", weights, ADAPTER) == masks
