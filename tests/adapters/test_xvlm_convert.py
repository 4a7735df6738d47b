"""Original X-VLM checkpoints: read safely, converted without loss, written back."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, SwinConfig

from vlp_adapters.xvlm import (
    XvlmForPretraining,
    XvlmPretrainConfig,
    load_original,
    save_original,
)
from vlp_adapters.xvlm.convert import (
    infer_config,
    read_state,
    state_from_original,
    state_to_original,
)
from vlp_adapters.xvlm.names import from_original_name, to_original_name
from vlp_plugins.runtime.errors import UnsupportedError

GOLDEN = Path(__file__).parents[1] / "golden" / "xvlm"


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture(scope="module")
def config(original: dict[str, Tensor]) -> XvlmPretrainConfig:
    return infer_config(original, vision_heads=4, text_heads=4)


def tiny_swin() -> XvlmForPretraining:
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    text = BertConfig(
        vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, fusion_layer=1
    )
    torch.manual_seed(0)
    return XvlmForPretraining(XvlmPretrainConfig(vision_config=swin, text_config=text)).eval()


# --- names ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vision_encoder.embeddings.class_embedding", "vision_encoder.class_embedding"),
        ("vision_encoder.embeddings.patch_embedding.weight", "vision_encoder.patch_embed.weight"),
        ("vision_encoder.embeddings.position_embedding.weight", "vision_encoder.pos_embed.weight"),
        (
            "vision_encoder.encoder.layers.3.self_attn.q_proj.weight",
            "vision_encoder.encoder.layers.3.self_attn.q_proj.weight",
        ),
        (
            "text_encoder.bert.encoder.layer.7.crossattention.self.key.weight",
            "text_encoder.bert.encoder.layer.7.crossattention.self.key.weight",
        ),
        (
            "vision_encoder.embeddings.patch_embeddings.projection.bias",
            "vision_encoder.patch_embed.proj.bias",
        ),
        ("vision_encoder.embeddings.norm.weight", "vision_encoder.patch_embed.norm.weight"),
        ("vision_encoder.layernorm.bias", "vision_encoder.norm.bias"),
        (
            "vision_encoder.encoder.layers.0.downsample.reduction.weight",
            "vision_encoder.layers.0.downsample.reduction.weight",
        ),
        (
            "vision_encoder.encoder.layers.2.blocks.11.attention.o_proj.weight",
            "vision_encoder.layers.2.blocks.11.attn.proj.weight",
        ),
        (
            "vision_encoder.encoder.layers.2.blocks.1.layernorm_before.weight",
            "vision_encoder.layers.2.blocks.1.norm1.weight",
        ),
        (
            "vision_encoder.encoder.layers.0.blocks.1.attention.relative_position_bias"
            ".relative_position_bias_table",
            "vision_encoder.layers.0.blocks.1.attn.relative_position_bias_table",
        ),
    ],
)
def test_names_translate_both_ways(ours: str, theirs: str) -> None:
    assert to_original_name(ours) == theirs
    assert from_original_name(theirs) == ours
    assert from_original_name(f"module.{theirs}") == ours


@pytest.mark.parametrize(
    "buffer",
    [
        "vision_encoder.position_ids",
        "text_encoder.bert.embeddings.position_ids",
        "vision_encoder.layers.0.blocks.1.attn_mask",
        "vision_encoder.layers.0.blocks.0.attn.relative_position_index",
    ],
)
def test_computed_buffers_have_no_name_here(buffer: str) -> None:
    assert from_original_name(buffer) is None


# --- round trips ---


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_original_file_comes_back_identical(
    suffix: str, tmp_path: Path, original: dict[str, Tensor], config: XvlmPretrainConfig
) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    save_original(load_original(GOLDEN / "model.safetensors", config), path)
    written = read_state(path)
    assert written.keys() - original.keys() == {"text_encoder.cls.predictions.bias"}
    assert original.keys() <= written.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name
    again = load_original(path, config)
    assert not again.training
    head = again.text_encoder.cls.predictions.decoder
    assert head.weight is again.text_encoder.bert.embeddings.word_embeddings.weight
    for one, other in json.loads((GOLDEN / "tied.json").read_text()):
        assert torch.equal(written[one], written[other])


def test_bare_and_data_parallel_states_are_read(
    tmp_path: Path, original: dict[str, Tensor], config: XvlmPretrainConfig
) -> None:
    torch.save({f"module.{name}": value for name, value in original.items()}, tmp_path / "x.pth")
    model = load_original(tmp_path / "x.pth", config)
    assert torch.equal(model.temp, original["temp"])


def test_a_head_whose_bias_was_saved_under_one_name_is_read(
    tmp_path: Path, original: dict[str, Tensor], config: XvlmPretrainConfig
) -> None:
    first, second = (f"text_encoder.cls.predictions.{name}" for name in ("decoder.bias", "bias"))
    state = {name: value for name, value in original.items() if name != first}
    save_file(state | {second: original[first]}, tmp_path / "x.safetensors")
    model = load_original(tmp_path / "x.safetensors", config)
    assert torch.equal(model.get_parameter(first), original[first])


def test_swin_comes_back_identical_through_its_fused_projections(tmp_path: Path) -> None:
    model = tiny_swin()
    state = state_to_original(model)
    fused = state["vision_encoder.layers.0.blocks.1.attn.qkv.weight"]
    block = model.vision_encoder.encoder.layers[0].blocks[1].attention
    assert torch.equal(fused[:8], block.q_proj.weight)
    assert torch.equal(fused[8:16], block.k_proj.weight)
    assert torch.equal(fused[16:], block.v_proj.weight)
    assert not any("q_proj" in name for name in state)
    assert state_from_original(state).keys() == model.state_dict().keys()
    save_original(model, tmp_path / "swin.pth")
    again = load_original(tmp_path / "swin.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), model.encode_image(images))


# --- configuration from shapes ---


def test_configuration_is_read_from_shapes(config: XvlmPretrainConfig) -> None:
    golden = json.loads((GOLDEN / "config.json").read_text())
    vision: Any = config.vision_config
    text: Any = config.text_config
    assert (vision.image_size, vision.patch_size) == (golden["image_res"], golden["patch_size"])
    assert vision.num_hidden_layers == golden["vision_num_hidden_layers"]
    assert vision.intermediate_size == golden["vision_intermediate_size"]
    assert text.num_hidden_layers == golden["text_num_hidden_layers"]
    assert text.max_position_embeddings == golden["max_position_embeddings"]
    assert config.fusion_layer == golden["fusion_layer"]
    assert config.embed_dim == golden["embed_dim"]


def test_base_configuration_is_read_completely() -> None:
    base = XvlmPretrainConfig.base()
    with torch.device("meta"):
        state = XvlmForPretraining(base).state_dict()
    read = infer_config({to_original_name(name): value for name, value in state.items()})
    assert read.to_diff_dict() == base.to_diff_dict()


def test_unusual_widths_need_the_number_of_heads(original: dict[str, Tensor]) -> None:
    with pytest.raises(UnsupportedError, match=r"32 wide.*pass text_heads"):
        infer_config(original)


# --- files that do not fit ---


class _Payload:
    """A pickled object that would run a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"model": _Payload(marker)}, tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Payload(marker)))
    for name in ("bad.pth", "raw.pth"):
        with pytest.raises(UnsupportedError, match=r"was not read.*bare state_dict"):
            load_original(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(
    suffix: str, tmp_path: Path, original: dict[str, Tensor]
) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save({"model": original}, path)
    else:
        save_file(original, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UnsupportedError, match=r"damaged|was not read"):
        load_original(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is not a file"):
        load_original(tmp_path / "none.pth")


@pytest.mark.parametrize("content", [[1, 2], {"model": {"epoch": 3}}, {}])
def test_a_file_without_state_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UnsupportedError, match="holds no state_dict"):
        load_original(tmp_path / "x.pth")


def test_keys_and_shapes_that_do_not_fit_are_named(
    tmp_path: Path, original: dict[str, Tensor], config: XvlmPretrainConfig
) -> None:
    path = tmp_path / "x.safetensors"

    save_file({name: value for name, value in original.items() if name != "temp"}, path)
    with pytest.raises(UnsupportedError, match=r"lacks 1 parameter\(s\) \(temp\)"):
        load_original(path, config)

    name = "text_encoder.cls.predictions.decoder.weight"
    save_file(original | {name: original[name][1:].clone()}, path)
    with pytest.raises(UnsupportedError, match=r"cls\.predictions\.decoder\.weight is \["):
        load_original(path, config)

    save_file(original | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UnsupportedError, match=r"unknown.*extra\.weight"):
        load_original(path, config)

    save_file(original | {"itm_head.3.bias": torch.zeros(5)}, path)
    with pytest.raises(UnsupportedError, match=r"itm_head\.3\.bias is \[5\].*\[2\]"):
        load_original(path, config)

    untied = {"text_encoder.cls.predictions.decoder.weight": torch.zeros(120, 32)}
    save_file(original | untied, path)
    with pytest.raises(
        UnsupportedError, match=r"decoder\.weight differs from .*word_embeddings\.weight"
    ):
        load_original(path, config)


def test_another_family_is_refused(tmp_path: Path) -> None:
    save_file({"visual_encoder.cls_token": torch.zeros(1)}, tmp_path / "blip.safetensors")
    with pytest.raises(UnsupportedError, match="no X-VLM pre-training checkpoint"):
        load_original(tmp_path / "blip.safetensors")
