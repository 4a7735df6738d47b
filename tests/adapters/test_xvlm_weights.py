"""X-VLM's weights: names, modalities, exclusions, and where they go in downstream models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_masks import random_masks
from transformers import SwinConfig
from xvlm_adapter_examples import ADAPTER, GOLDEN, second_moments, tiny, tiny_batch, tiny_config

from benchmarks.parity.xvlm import model_from_golden
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig
from vlp_adapters.xvlm.convert import state_to_original
from vlp_plugins.masks.published_files import export_published, import_published
from vlp_plugins.models.adapter import CaptioningAdapter, MatchingAdapter, RetrievalAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError


@pytest.fixture(scope="module")
def golden() -> XvlmForPretraining:
    return model_from_golden(GOLDEN)


def tiny_swin() -> XvlmForPretraining:
    sizes: dict[str, Any] = {"depths": [2, 1], "num_heads": [2, 4], "window_size": 2}
    return tiny(vision_config=SwinConfig(image_size=16, patch_size=4, embed_dim=8, **sizes))


# --- names ---


def test_prunes_what_the_published_code_prunes_in_its_order(golden: XvlmForPretraining) -> None:
    summary = json.loads((GOLDEN / "summary.json").read_text())
    weights = WeightMap.of(golden, ADAPTER)
    originals = [ADAPTER.original_name(weight.aliases[0]) for weight in weights.values()]
    assert originals == summary["prunable_parameters"]
    assert len(originals) == 50
    assert weights.numel == 53_760


def test_every_modality_counts_its_layers_from_0(golden: XvlmForPretraining) -> None:
    weights = WeightMap.of(golden, ADAPTER)
    layers = {
        modality: sorted({weight.depth for weight in members})
        for modality, members in weights.by_modality().items()
    }
    assert layers == {"vision": [0, 1, 2], "text": [0, 1], "fusion": [0, 1]}
    assert all(w.name.startswith(f"{w.modality}.{w.depth}.") for w in weights.values())
    assert weights["fusion.1.cross.key"].aliases == (
        "text_encoder.bert.encoder.layer.3.crossattention.self.key.weight",
    )
    names = list(weights)
    assert names[:6] == [
        f"vision.0.{part}"
        for part in ("attention.key", "attention.value", "attention.query", "attention.output",
                     "mlp.fc1", "mlp.fc2")
    ]  # fmt: skip
    parts = ["query", "key", "value", "output"]
    text = [f"self.{part}" for part in parts] + ["ffn.fc1", "ffn.fc2"]
    assert [name for name in names if name.startswith("text.1.")] == [f"text.1.{p}" for p in text]
    cross = [f"cross.{part}" for part in parts]
    assert [name for name in names if name.startswith("fusion.0.")] == [
        f"fusion.0.{p}" for p in text[:4] + cross + text[4:]
    ]


def test_keys_and_values_of_cross_attention_read_image_tokens(golden: XvlmForPretraining) -> None:
    weights = WeightMap.of(golden, ADAPTER)
    assert all(len(weight.owners) == 1 for weight in weights.values())
    reads_image = {name for name, w in weights.items() if w.owners[0].tokens == "vision"}
    assert reads_image == {
        name
        for name in weights
        if name.startswith("vision.") or re.search(r"cross\.(key|value)$", name)
    }


def test_base_size_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = XvlmForPretraining(XvlmPretrainConfig.base())
    groups = WeightMap.of(model, ADAPTER).by_modality()
    counts = {name: sum(weight.numel for weight in group) for name, group in groups.items()}
    assert counts == {"vision": 84_934_656, "text": 42_467_328, "fusion": 56_623_104}
    assert sum(counts.values()) == 184_025_088


@pytest.mark.parametrize("make", [tiny, tiny_swin])
def test_what_is_left_alone_has_a_reason(make: Any) -> None:
    model = make()
    prunable = {weight.aliases[0] for weight in WeightMap.of(model, ADAPTER).values()}
    reasons = {}
    for path, _ in model.named_parameters():
        if path not in prunable:
            rules = [e for e in ADAPTER.exclusions(model) if re.search(e.pattern, path)]
            assert rules, path
            reasons[path] = rules[0].reason
    assert reasons["temp"].startswith("temperature")
    assert reasons["vision_proj.weight"].startswith("projection")
    assert reasons["itm_head.0.weight"].startswith("ITM head")
    assert reasons["text_encoder.bert.embeddings.word_embeddings.weight"].startswith("embeddings")
    assert reasons["text_encoder.bert.encoder.layer.0.output.dense.bias"] == "bias"
    assert not any(re.search(e.pattern, p) for e in ADAPTER.exclusions(model) for p in prunable)


def test_a_layer_that_something_wraps_is_refused() -> None:
    model = tiny()
    model.text_encoder.bert.encoder.layer[0].intermediate.dense = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"intermediate\.dense is a Identity, not a Linear"):
        WeightMap.of(model, ADAPTER)


def test_claims_its_class_and_no_other() -> None:
    class Derived(XvlmForPretraining):
        pass

    assert ADAPTER.claims(tiny())
    assert ADAPTER.claims(Derived(tiny_config()))
    assert not ADAPTER.claims(tiny().vision_encoder)
    assert isinstance(ADAPTER, RetrievalAdapter)
    assert isinstance(ADAPTER, MatchingAdapter)
    assert isinstance(ADAPTER, CaptioningAdapter)


def test_asking_about_another_model_imports_no_modelling_library() -> None:
    code = (
        "import sys; from torch import nn; from vlp_adapters.xvlm.adapter import XvlmAdapter;"
        "assert not XvlmAdapter().claims(nn.Linear(1, 1)); assert XvlmAdapter().load('x') is None;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# --- downstream models ---


def test_retrieval_keeps_every_weight_once() -> None:
    where = ADAPTER.for_task("retrieval", tiny())
    assert where["vision.0.mlp.fc1"] == ("vision_encoder.encoder.layers.0.mlp.fc1.weight",)
    assert where["text.0.self.query"] == (
        "text_encoder.encoder.layer.0.attention.self.query.weight",
    )
    assert where["fusion.1.cross.key"] == (
        "text_encoder.encoder.layer.2.crossattention.self.key.weight",
    )


def test_captioning_turns_the_text_encoder_into_the_decoder() -> None:
    where = ADAPTER.for_task("captioning", tiny())
    assert where["vision.1.attention.key"] == (
        "vision_encoder.encoder.layers.1.self_attn.k_proj.weight",
    )
    assert where["text.0.ffn.fc2"] == ("text_decoder.bert.encoder.layer.0.output.dense.weight",)
    assert where["fusion.0.ffn.fc1"] == (
        "text_decoder.bert.encoder.layer.1.intermediate.dense.weight",
    )


def test_vqa_decoder_inherits_from_the_fusion_layers() -> None:
    where = ADAPTER.for_task("vqa", tiny())
    assert where["text.0.self.value"] == (
        "text_encoder.encoder.layer.0.attention.self.value.weight",
    )
    assert where["fusion.1.self.output"] == (
        "text_encoder.encoder.layer.2.attention.output.dense.weight",
        "text_decoder.bert.encoder.layer.1.attention.output.dense.weight",
    )
    assert where["fusion.0.cross.key"] == (
        "text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight",
    )


def test_vqa_keys_and_values_are_new_where_the_widths_differ(golden: XvlmForPretraining) -> None:
    """The golden model's vision encoder is 24 wide, its text encoder 32."""
    where = ADAPTER.for_task("vqa", golden)
    single = {name for name, paths in where.items() if len(paths) == 1}
    assert {name for name in single if name.startswith("fusion.")} == {
        f"fusion.{j}.cross.{part}" for j in (0, 1) for part in ("key", "value")
    }


@pytest.mark.parametrize("task", ["pretraining", "retrieval", "captioning", "vqa"])
def test_every_weight_has_its_own_path(golden: XvlmForPretraining, task: str) -> None:
    where = ADAPTER.for_task(task, golden)
    assert list(where) == list(WeightMap.of(golden, ADAPTER))
    paths = [path for paths in where.values() for path in paths]
    assert len(set(paths)) == len(paths)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="pretraining, retrieval, captioning, vqa"):
        ADAPTER.for_task("grounding", tiny())


# --- Swin ---


@torch.no_grad()
def test_swin_counts_blocks_over_its_stages() -> None:
    model = tiny_swin()
    weights = WeightMap.of(model, ADAPTER)
    vision = [name for name in weights if name.startswith("vision.")]
    assert len(vision) == 3 * 6 + 1
    assert vision[12] == "vision.1.downsample.reduction"
    assert vision[13] == "vision.2.attention.query"
    batch = tiny_batch()
    reached = second_moments(model, [batch], published=True)
    assert set(reached) == set(weights)
    five = torch.tensor([[1, 7, 8, 9, 2], [1, 7, 2, 0, 0]])  # the image has 1 + 2 x 2 tokens
    batch |= {"input_ids": five, "attention_mask": five.sign()}
    fusion = list(ADAPTER.streams(model, batch, published=True))[2]
    assert fusion.real["vision"] is fusion.real["text"]
    assert model.encode_image(batch["pixel_values"]).shape[1] == 5


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa", "nlvr2"])
def test_swin_keeps_its_paths_in_downstream_models(task: str) -> None:
    model = tiny_swin()
    where, own = ADAPTER.for_task(task, model), ADAPTER.for_task("pretraining", model)
    vision = {name: paths for name, paths in own.items() if name.startswith("vision.")}
    assert {name: where[name] for name in vision} == vision


# --- published masks ---


def test_masks_of_swin_are_those_of_the_originals_fused_projections(tmp_path: Path) -> None:
    model = tiny_swin()
    weights = WeightMap.of(model, ADAPTER)
    masks = random_masks(model, adapter=ADAPTER)
    export_published(masks, tmp_path / "masks.pth", weights, ADAPTER)
    written = torch.load(tmp_path / "masks.pth", weights_only=True)
    assert sum(int((mask == 0).sum()) for mask in written.values()) == masks.removed
    dense = state_to_original(model)
    masked = {
        name: value * written.pop(f"{name}_pruning_mask", torch.tensor(1.0))
        for name, value in dense.items()
    }
    assert not written  # every key is one of the original
    assert import_published(tmp_path / "masks.pth", weights, ADAPTER) == masks
    masks.apply(model)
    for name, value in state_to_original(model).items():
        assert torch.equal(masked[name], value), name
