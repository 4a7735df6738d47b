"""Writing a model folder, and giving a model its weights back."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from toy_masks import Pretraining, ToyAdapter
from transformers import ViTConfig, ViTModel

from vlp_plugins.loading import load_structure
from vlp_plugins.models.saving import copy_companions, restored, write_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError

TINY = ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    image_size=8,
    patch_size=4,
)


def test_a_block_that_prunes_leaves_the_weights_as_they_were() -> None:
    model = Pretraining()
    weights = WeightMap.of(model, ToyAdapter())
    before = weights.content_hash()
    with suppress(KeyboardInterrupt), restored(weights):
        for weight in weights.values():
            torch.nn.init.zeros_(weight.parameter)
        raise KeyboardInterrupt
    assert weights.content_hash() == before
    assert model.encoder["ffn"].weight is model.decoder["ffn"].weight, "ties stay"


def test_the_processor_comes_along_from_a_folder_or_from_beside_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "preprocessor_config.json", "notes.txt"):
        (source / name).write_text(name)
    (source / "old.pth").write_text("weights")
    model = ViTModel(TINY)
    for number, origin in enumerate((source, source / "old.pth")):
        target = tmp_path / f"target{number}"
        write_model(model, target, source=str(origin))
        assert sorted(path.name for path in target.iterdir()) == [
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "tokenizer.json",
            "vocab.txt",
        ]


def test_others_may_read_the_weights_as_they_may_the_configuration(tmp_path: Path) -> None:
    write_model(ViTModel(TINY), tmp_path / "m", source="a/hub-id")
    modes = {path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert len(modes) == 1


def test_a_model_that_cannot_save_itself_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UnsupportedError, match=r"Pretraining has no save_pretrained; apply"):
        write_model(Pretraining(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_without_weights_takes_no_memory(tmp_path: Path) -> None:
    ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    model, adapter = load_structure(str(tmp_path))
    assert adapter.name == "vit"
    assert all(parameter.is_meta for parameter in model.parameters())
    assert WeightMap.of(model, adapter).numel == 84_934_656
    assert not model.training


def test_a_configuration_of_an_unknown_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "surprise"}')
    with pytest.raises(UnsupportedError, match=r"cannot make a model of .*config.json"):
        load_structure(str(tmp_path))


def test_what_a_processor_is_made_of_comes_along(tmp_path: Path) -> None:
    names = {
        "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "tokenizer.model",
        "video_preprocessor_config.json", "spiece.model", "qformer_tokenizer/tokenizer.json",
        "qformer_tokenizer/tokenizer_config.json",
    }  # fmt: skip
    source, target = tmp_path / "source", tmp_path / "target"
    for name in (*names, "notes.txt", "model.safetensors"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_companions(str(source), target)
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert found == names
