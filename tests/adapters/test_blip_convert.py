"""Original BLIP checkpoints are read safely, checked, and written back unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig, load_original, save_original
from vlp_adapters.blip.convert import infer_config
from vlp_adapters.blip.names import from_original_name, to_original_name
from vlp_plugins.runtime.errors import UnsupportedError

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"


@pytest.fixture
def original() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture
def config(original: dict[str, Tensor]) -> BlipPretrainConfig:
    return infer_config(original, vision_heads=4, text_heads=4, sep_token_id=2)


def write(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        (
            "vision_model.embeddings.patch_embedding.weight",
            "visual_encoder.patch_embed.proj.weight",
        ),
        (
            "vision_model.encoder.layers.11.self_attn.qkv.weight",
            "visual_encoder.blocks.11.attn.qkv.weight",
        ),
        (
            "vision_model_m.encoder.layers.0.self_attn.projection.bias",
            "visual_encoder_m.blocks.0.attn.proj.bias",
        ),
        (
            "vision_model.encoder.layers.3.layer_norm2.weight",
            "visual_encoder.blocks.3.norm2.weight",
        ),
        ("vision_model.post_layernorm.weight", "visual_encoder.norm.weight"),
        (
            "text_encoder.encoder.layer.0.attention.self.query.weight",
            "text_encoder.encoder.layer.0.attention.self.query.weight",
        ),
        ("temp", "temp"),
    ],
)
def test_names_translate_both_ways(ours: str, theirs: str) -> None:
    assert to_original_name(ours) == theirs
    assert from_original_name(theirs) == ours
    assert from_original_name(f"module.{theirs}") == ours


def test_computed_buffers_have_no_name_here() -> None:
    assert from_original_name("text_encoder.embeddings.position_ids") is None


def test_every_name_of_the_model_translates_and_comes_back(
    original: dict[str, Tensor], config: BlipPretrainConfig
) -> None:
    ours = set(BlipForPretraining(config).state_dict()) - {"text_decoder.cls.predictions.bias"}
    assert {to_original_name(name) for name in ours} == {
        name for name in original if not name.endswith("position_ids")
    }
    assert all(from_original_name(to_original_name(name)) == name for name in ours)


@pytest.mark.parametrize("file", ["model.pth", "model.safetensors"])
def test_a_round_trip_gives_every_tensor_back(
    original: dict[str, Tensor], config: BlipPretrainConfig, tmp_path: Path, file: str
) -> None:
    save_original(load_original(GOLDEN / "model.safetensors", config), tmp_path / file)
    path = tmp_path / file
    written = load_file(path) if path.suffix == ".safetensors" else torch.load(path)["model"]
    second = {"text_decoder.cls.predictions.bias"}  # BLIP has it, MULTIFLOW's copy of BLIP has not
    assert written.keys() == original.keys() | second
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())


def test_a_bare_or_parallel_state_dict_is_read_too(
    original: dict[str, Tensor], config: BlipPretrainConfig, tmp_path: Path
) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in original.items()}, tmp_path / "x.pth")
    model = load_original(tmp_path / "x.pth", config)
    assert torch.equal(model.image_queue, original["image_queue"])
    assert not model.training


def test_shared_tensors_may_be_stored_once(
    original: dict[str, Tensor], config: BlipPretrainConfig, tmp_path: Path
) -> None:
    once = {
        name: tensor
        for name, tensor in original.items()
        if not name.startswith("text_decoder.bert.") or ".attention." in name
    }
    del once["text_decoder.cls.predictions.decoder.weight"]
    assert len(once) < len(original)
    model = load_original(write(once, tmp_path / "once.pth"), config)
    words = original["text_encoder.embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_decoder.cls.predictions.decoder.weight, words)


def test_a_checkpoint_stripped_of_its_momentum_state_loads(
    original: dict[str, Tensor], config: BlipPretrainConfig, tmp_path: Path
) -> None:
    stripped = {
        name: tensor
        for name, tensor in original.items()
        if "_m." not in name and "queue" not in name
    }
    model = load_original(write(stripped, tmp_path / "stripped.pth"), config)
    for online, twin in model.momentum_pairs():
        for fast, slow in zip(online.parameters(), twin.parameters(), strict=True):
            assert torch.equal(fast, slow)
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(16))


def test_ties_are_tied_and_momentum_copies_frozen(config: BlipPretrainConfig) -> None:
    model = load_original(GOLDEN / "model.safetensors", config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert model.all_tied_weights_keys
    for copy, source in model.all_tied_weights_keys.items():
        assert parameters[copy] is parameters[source], copy
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert not any("_m." in name for name in trained)
    assert {name.replace("_m.", ".", 1) for name in parameters if "_m." in name} <= trained


def test_sizes_are_read_from_shapes(config: BlipPretrainConfig) -> None:
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (32, 8, 24)
    assert (vision.num_hidden_layers, vision.intermediate_size) == (2, 96)
    assert (text.vocab_size, text.hidden_size, text.intermediate_size) == (120, 32, 64)
    assert (text.num_hidden_layers, text.max_position_embeddings) == (2, 32)
    assert (config.embed_dim, config.queue_size) == (16, 16)
    assert (config.dec_token_id, config.enc_token_id) == (118, 119)


def test_heads_of_unusual_widths_are_asked_for(original: dict[str, Tensor]) -> None:
    with pytest.raises(UnsupportedError, match=r"text encoder is 32 wide.*pass text_heads"):
        infer_config(original)


def test_missing_unexpected_and_misshapen_tensors_are_named(
    original: dict[str, Tensor], config: BlipPretrainConfig, tmp_path: Path
) -> None:
    lacking = {k: v for k, v in original.items() if k != "itm_head.bias"}
    with pytest.raises(UnsupportedError, match=r"lacks 1 parameter\(s\) \(itm_head.bias\)"):
        load_original(write(lacking, tmp_path / "lacking.pth"), config)
    surplus = original | {"visual_encoder.blocks.7.mlp.fc1.bias": torch.zeros(96)}
    with pytest.raises(UnsupportedError, match=r"unknown.*visual_encoder.blocks.7.mlp.fc1.bias"):
        load_original(write(surplus, tmp_path / "surplus.pth"), config)
    misshapen = original | {"text_proj.bias": torch.zeros(3)}
    with pytest.raises(UnsupportedError, match=r"text_proj.bias is \[3\].*asks for \[16\]"):
        load_original(write(misshapen, tmp_path / "misshapen.pth"), config)
    path = write(original, tmp_path / "whole.pth")
    with pytest.raises(UnsupportedError, match="'vision_hedas' is no option of load_original"):
        load_original(path, config, vision_hedas=3)
    with pytest.raises(UnsupportedError, match="vision_heads: the configuration that is given"):
        load_original(path, config, vision_heads=3)


def test_text_towers_that_were_trained_apart_are_refused(
    original: dict[str, Tensor], config: BlipPretrainConfig, tmp_path: Path
) -> None:
    name = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    apart = original | {name: original[name] + 1}
    with pytest.raises(UnsupportedError, match="are one parameter in BLIP pre-training"):
        load_original(write(apart, tmp_path / "apart.pth"), config)


class Malicious:
    """Creates a folder when it is unpickled by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": {"temp": Malicious(trap)}}, tmp_path / "evil.pth")
    with pytest.raises(UnsupportedError, match="could run code"):
        load_original(tmp_path / "evil.pth")
    assert not trap.exists()


def test_files_that_are_no_checkpoint_are_refused(
    original: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="is not a file"):
        load_original(tmp_path / "absent.pth")
    whole = write(original, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedError, match=r"damaged or no checkpoint|no PyTorch file"):
        load_original(tmp_path / "cut.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "epoch.pth")
    with pytest.raises(UnsupportedError, match="epoch is not a tensor"):
        load_original(tmp_path / "epoch.pth")
    save_file({"temp": torch.zeros(())}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedError, match="no BLIP pre-training checkpoint"):
        load_original(tmp_path / "other.safetensors")
