"""Which blocks are found, under which names, and what is left out for which reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structured_examples import DEC, IMAGE, MAKERS, SIZES, WORDS, made, prepared
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, SwinConfig, SwinModel

from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.parts import Attention
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.structured.check import check_equal, example_batch, outputs
from vlp_plugins.structured.cuts import cut, masked
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of, uncut


def named(prefix: str, *parts: str, layers: int = 2) -> set[str]:
    return {f"{prefix}.{layer}.{part}" for layer in range(layers) for part in parts}


VISION = named("vision", "attention", "mlp")
XVLM = named("text", "self", "ffn", layers=1) | named("fusion", "self", "cross", "ffn", layers=1)
TWO_TOWERS = VISION | named("text", "self", "ffn")
NAMES = {
    "blip pre-training": VISION | named("text", "self", "cross", "ffn") | named("decoder", "self"),
    "blip retrieval": VISION | named("text", "self", "cross", "ffn"),
    "blip captioning": VISION | named("decoder", "self") | named("text", "cross", "ffn"),
    "blip vqa": VISION
    | named("text", "self", "cross", "ffn")
    | named("decoder", "self", "cross", "ffn"),
    "blip two towers": TWO_TOWERS,
    "xvlm": VISION | XVLM,
    "xvlm captioning": VISION | XVLM,
    "xvlm vqa": VISION | XVLM | named("decoder", "self", "cross", "ffn", layers=1),
    "clip": TWO_TOWERS,
    "siglip": TWO_TOWERS,
    "siglip 2": TWO_TOWERS,
}


@pytest.mark.parametrize("name", MAKERS)
def test_blocks_have_canonical_names_and_hold_every_prunable_weight(name: str) -> None:
    model, adapter = prepared(name)
    blocks = blocks_of(model, adapter)
    assert {block.name for block in blocks} == NAMES.get(name, VISION)
    weights = WeightMap.of(model, adapter)
    held = {part.weight: (block, part) for block in blocks for part in block.parts}
    # New keys and values of a decoder are cut with its queries, though no method prunes them.
    assert held.pop(None, None) is None or name == "xvlm vqa"
    assert held.keys() == weights.keys()
    for weight, (block, part) in held.items():
        assert weights[weight].modality == block.modality
        assert model.get_submodule(part.path).weight is weights[weight].parameter


def test_what_encoder_and_decoder_share_is_one_block() -> None:
    model, adapter = prepared("blip pre-training")
    blocks = {block.name: block for block in blocks_of(model, adapter)}
    cross = blocks["text.1.cross"]
    assert isinstance(cross, Attention)
    layer = "encoder.layer.1.crossattention.self"
    assert cross.modules == (f"text_encoder.{layer}", f"text_decoder.bert.{layer}")
    assert cross.followers == (f"text_encoder_m.{layer}",)
    assert cross.query.paths == tuple(f"{path}.query" for path in cross.modules)
    assert blocks["text.0.self"].parts[0].paths == (
        "text_encoder.encoder.layer.0.attention.self.query",
    )
    assert blocks["decoder.0.self"].parts[0].followers == ()
    assert blocks["vision.0.mlp"].output.followers == ("vision_model_m.encoder.layers.0.mlp.fc2",)


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("siglip", "vision_model.head.attention", "nn.MultiheadAttention"),
        ("siglip", "vision_model.head.mlp", "pooling head"),
        ("blip two towers", "text_model.encoder.layer.0.crossattention", "never reads images"),
        (
            "blip pre-training",
            "vision_model_m.encoder.layers.0.self_attn",
            "momentum copy",
        ),
    ],
)
def test_what_is_left_out_has_a_reason(name: str, path: str, reason: str) -> None:
    model, adapter = prepared(name)
    assert reason in uncut(model, adapter)[path]


def test_a_fused_layer_is_left_out_until_the_model_is_prepared() -> None:
    model = made("blip retrieval")
    adapter = registry().adapter_for(model)
    assert not [b for b in blocks_of(model, adapter) if b.name == "vision.0.attention"]
    reason = uncut(model, adapter)["vision_model.encoder.layers.0.self_attn"]
    assert "prepare(model, adapter)" in reason
    with pytest.raises(StructureError, match=r"no block 'vision\.0\.attention'"):
        cut(model, adapter, Record({"vision.0.attention": Kept(heads=(0,))}))


def test_any_model_of_transformers() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**WORDS)).eval()
    adapter = ModuleAdapter(model)
    batch = example_batch(model, adapter)
    assert [block.name for block in blocks_of(model, adapter)][:2] == [
        "encoder.layer.0.attention",
        "encoder.layer.0.ffn",
    ]
    record = Record(
        {
            "encoder.layer.0.attention": Kept(heads=(1, 2), dims=((0, 3), (1, 2))),
            "encoder.layer.1.ffn": Kept(units=(0, 1, 5)),
        }
    )
    with masked(model, adapter, record):
        expected = outputs(model, adapter, batch)
    cut(model, adapter, record)
    check_equal(expected, outputs(model, adapter, batch))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: LlamaModel(LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2)),
            "grouped queries",
        ),
        (
            lambda: SwinModel(
                SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1],
                           num_heads=[2, 2], window_size=2)
            ),
            "relative_position_bias",
        ),
    ],
)  # fmt: skip
def test_attention_that_cannot_be_cut(make: Any, reason: str) -> None:
    model = make()
    adapter = ModuleAdapter(model)
    blocks = blocks_of(model, adapter)
    assert blocks
    assert not [block for block in blocks if isinstance(block, Attention)]
    assert reason in " ".join(uncut(model, adapter).values())


def test_a_weight_that_something_else_uses_is_not_cut() -> None:
    model = BertModel(BertConfig(**(WORDS | {"intermediate_size": 16})))
    layer = model.encoder.layer[0]
    layer.attention.output.dense.weight = layer.intermediate.dense.weight
    adapter = ModuleAdapter(model)
    names = {block.name for block in blocks_of(model, adapter)}
    assert names == {"encoder.layer.1.attention", "encoder.layer.1.ffn"}
    assert "shares a weight" in uncut(model, adapter)["encoder.layer.0.attention"]


def test_a_wrapped_layer_is_told() -> None:
    model = BertModel(BertConfig(**WORDS))
    layer = model.encoder.layer[0].output.dense
    nn.utils.parametrizations.weight_norm(layer)
    reasons = uncut(model, ModuleAdapter(model))
    assert "no plain Linear layer" in reasons["encoder.layer.0"]


def test_made_up_batches_have_padding_and_end_tokens() -> None:
    model, adapter = prepared("clip")
    batch = example_batch(model, adapter)
    assert batch["pixel_values"].shape == (2, 3, IMAGE["image_size"], IMAGE["image_size"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask.sum(dim=1).tolist() == [8, 4]
    assert ids[0, 7] == ids[1, 3] == 49
    assert not (ids[mask.bool()] == 0).any()
    assert example_batch(model, adapter)["input_ids"].equal(ids)
    blip, blip_adapter = prepared("blip pre-training")
    words = example_batch(blip, blip_adapter)["input_ids"]
    assert not (words == DEC).any()
