"""ViT checkpoints of DINO's and timm's code: loaded, compared, saved, pruned, described."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import base_state, base_tensors, compare, recorded
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from vlp_command import command

from vlp_adapters.vit import load_original, save_original
from vlp_adapters.vit.original import state_to_original
from vlp_plugins.loading import describe_file, load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError

IMAGES = recorded("clip_openai_w128", "inputs")["image"]
HEADS = '{"vision_heads": 3}'


def write(folder: Path, name: str, file: str = "vit.pth") -> Path:
    """The recorded file, with its heads in a file next to it."""
    state = recorded(name, "state")
    if name == "dino_full":  # as main_dino.py saves it, arguments of argparse included
        teacher = {key.removeprefix("teacher."): value for key, value in state.items()}
        student = {f"module.{key}": value + 1 for key, value in teacher.items()}
        arguments = argparse.Namespace(arch="vit_small", lr=5e-4, data_path="images")
        content: Any = {
            "student": student, "teacher": teacher, "optimizer": {"state": {}}, "epoch": 3,
            "args": arguments, "dino_loss": {"center": torch.zeros(1, 40)}, "fp16_scaler": {},
        }  # fmt: skip
    else:
        content = state
    torch.save(content, folder / file)
    (folder / file).with_suffix(".json").write_text(HEADS)
    return folder / file


def test_originals_of_dino(tmp_path, record_property) -> None:
    model, adapter = load_model(str(write(tmp_path, "dino")))
    assert adapter.name == "vit"
    assert type(model) is ViTModel
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(pixel_values=IMAGES, output_attentions=True)
    outputs = {
        "cls_features": found.last_hidden_state[:, 0],
        "tokens_last_layer_normed": found.last_hidden_state,
        "last_attention": found.attentions[-1],
    }
    compare("dino", outputs, record_property)


def test_originals_of_dino_at_another_size_differ_by_how_positions_are_interpolated(tmp_path):
    """DINO scales by (side / patch + 0.1) / sqrt(N), transformers to the exact size."""
    model = load_original(write(tmp_path, "dino"))
    pixels = recorded("dino", "inputs")["image_48x40"]
    with torch.no_grad():
        found = model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    difference = (found - recorded("dino", "outputs")["cls_features_48x40"]).abs().max()
    assert 1e-3 < difference < 2e-2  # of features up to 2.3


def test_originals_of_the_training_file_of_dino_are_the_teacher(
    tmp_path, record_property, caplog
) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path, "dino_full")
    assert describe_file(str(path)) == (
        "DINO training file (its teacher is used, without projection head)"
    )
    model, _ = load_model(str(path))
    assert "8 tensors of its projection head are left out" in caplog.text
    with torch.no_grad():
        tokens = model(pixel_values=IMAGES).last_hidden_state
    compare("dino_full", {"teacher_cls_features": tokens[:, 0]}, record_property)


def test_originals_of_timm_have_a_classifier(tmp_path, record_property) -> None:
    model, adapter = load_model(str(write(tmp_path, "timm_vit")))
    assert type(model) is ViTForImageClassification
    with torch.no_grad():
        tokens = model.vit(pixel_values=IMAGES).last_hidden_state
    outputs = {
        "tokens": tokens,
        "cls_features": tokens[:, 0],
        "logits": adapter.classify(model, {"pixel_values": IMAGES}).detach(),
    }
    compare("timm_vit", outputs, record_property)


class Program:
    """What no checkpoint may hold."""


def test_originals_hold_arguments_and_no_other_objects(tmp_path) -> None:
    content = {"teacher": recorded("dino", "state"), "args": argparse.Namespace(lr=Program())}
    torch.save(content, tmp_path / "vit.pth")
    (tmp_path / "vit.json").write_text(HEADS)
    with pytest.raises(UnsupportedError, match="holds objects other than tensors"):
        load_original(tmp_path / "vit.pth")
    content["args"].lr = {"lr": [0.1]}
    torch.save(content, tmp_path / "vit.pth")
    assert type(load_original(tmp_path / "vit.pth")) is ViTModel


@pytest.mark.parametrize("name", ["dino", "timm_vit"])
@pytest.mark.parametrize("file", ["again.pth", "again.safetensors"])
def test_originals_are_written_back_as_they_came(name, file, tmp_path) -> None:
    model = load_original(write(tmp_path, name))
    save_original(model, tmp_path / file)
    again = load_original(tmp_path / file, model.config)
    written = torch.load(tmp_path / file) if file.endswith("pth") else state_to_original(again)
    expected = recorded(name, "state")
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(written[key], value)


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("dino_vits16", ViTModel, 6),
        ("timm_vit_base_patch16_224", ViTForImageClassification, 12),
    ],
)
def test_originals_of_the_published_size_have_all_keys(name, kind, heads, monkeypatch) -> None:
    with FakeTensorMode():
        state = base_state(name)
        monkeypatch.setattr("vlp_adapters.vit.original.read_state", lambda path: state)
        model = load_original("nowhere.pth")
        written = state_to_original(model)
    assert type(model) is kind
    assert model.config.num_attention_heads == heads
    assert {
        key: (list(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in written.items()
    } == base_tensors(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, r"48 wide, .* pass vision_heads, or .*\.json next to it"),
        ('{"vision_heads": 5}', "vision_heads is 5, not a number that divides the 48"),
        ('{"text_heads": 2}', r"vit.json has text_heads, which the loader of vit.pth does not"),
        ('{"vision_heads": 3, "layer_norm_eps": 2.0}', r"layer_norm_eps is 2.0, not a number"),
    ],
)
def test_originals_with_wrong_options_are_refused(options, message, tmp_path) -> None:
    path = write(tmp_path, "dino")
    path.with_suffix(".json").unlink()
    if options:
        path.with_suffix(".json").write_text(options)
    with pytest.raises(UnsupportedError, match=message):
        load_original(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blocks.0.ls1.gamma": torch.ones(48)}, "DINOv2 checkpoint.* is not supported; give the"),
        ({"cls_token": None}, "without a class token, which is not supported"),
        ({"norm.bias": None}, r"lacks 1 parameter\(s\) \(norm.bias\)"),
        ({"fc_norm.bias": torch.ones(48)}, r"unknown .* 1 parameter\(s\) \(fc_norm.bias\)"),
        (
            {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10), "dist": torch.ones(1)},
            r"unknown .* 1 parameter\(s\) \(dist\)",
        ),
    ],
)
def test_originals_that_transformers_has_no_class_for_are_refused(extra, message, tmp_path):
    state = {k: v for k, v in (recorded("dino", "state") | extra).items() if v is not None}
    save_file(state, tmp_path / "vit.safetensors")
    (tmp_path / "vit.json").write_text(HEADS)
    with pytest.raises(UnsupportedError, match=message):
        load_model(str(tmp_path / "vit.safetensors"))


def test_a_model_with_a_pooler_is_no_original(tmp_path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, intermediate_size=16, image_size=16, patch_size=8))
    with pytest.raises(UnsupportedError, match="ViTModel has pooler.dense.weight, for which timm"):
        save_original(model, tmp_path / "vit.pth")


@pytest.mark.parametrize("name", ["dino", "timm_vit"])
@pytest.mark.parametrize("method", ["omp", "multiflow", "wanda", "snip"])
def test_originals_are_pruned(name, method, tmp_path) -> None:
    model, adapter = load_model(str(write(tmp_path, name)))
    batch = {"pixel_values": IMAGES, "labels": torch.tensor([0, 3, 9])}
    if name == "dino" and method == "snip":
        with pytest.raises(UnsupportedError, match="no classifier|no loss|labels"):
            prune(model, [batch], method=method, sparsity=0.5, adapter=adapter)
        return
    masks = prune(model, [batch], method=method, sparsity=0.5, adapter=adapter)
    assert len(masks) == 2 * 6
    assert sum(int(masks[weight].sum()) for weight in masks) == 2 * 12 * 48 * 48 // 2
    if name == "dino":
        classifier = adapter.downstream_model("classification", model, classes=4)
        masks.apply(classifier)
        assert type(classifier) is ViTForImageClassification
        assert masks.verify(classifier) == []


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of ten classes in a folder for each."""
    folder = tmp_path_factory.mktemp("images") / "images"
    for number in range(10):
        (folder / f"c{number}").mkdir(parents=True)
        for n in range(2):
            color = (20 * number, 255 - 25 * number, 100 * n)
            Image.new("RGB", (32, 32), color).save(folder / f"c{number}" / f"{n}.png")
    return folder


@pytest.mark.parametrize("name", ["dino", "dino_full", "timm_vit"])
def test_originals_are_pruned_from_the_command_line(name, classes, tmp_path) -> None:
    path = write(tmp_path, name)
    shown = command("inspect", path).stdout
    assert shown.startswith(f"{path}: {'DINO training' if name == 'dino_full' else 'ViT check'}")
    run = ("prune", "--model", path, "--data", classes, "--method", "multiflow", "--sparsity", 0.5,
           "--out", tmp_path / "out")  # fmt: skip
    failed = command(*run, code=2)
    assert f"no processor next to {path}" in failed.stderr
    sides = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=sides).save_pretrained(tmp_path / "processor")
    command(*run, "--processor", tmp_path / "processor")
    file = next((tmp_path / "out").rglob("masks*.safetensors"))
    masks = Masks.load(file)
    model, adapter = load_model(str(path))
    masks.apply(model, adapter)
    assert masks.verify(model, adapter) == []
    tuned = tmp_path / "tuned"
    command("finetune", path, "--task", "classification", "--data", classes, "--masks", file,
            "--processor", tmp_path / "processor", "--epochs", 1, "--batch-size", 10,
            "--out", tuned)  # fmt: skip
    classifier, _ = load_model(str(tuned))
    assert type(classifier) is ViTForImageClassification
    assert masks.verify(classifier, adapter) == []
    if name == "timm_vit":
        shown = command("evaluate", path, "--data", classes, "--task", "classification",
                        "--processor", tmp_path / "processor").stdout  # fmt: skip
        assert "top-1" in shown


def test_the_heads_may_be_in_a_file_for_originals_in_safetensors(tmp_path) -> None:
    save_file(recorded("dino", "state"), tmp_path / "dino.safetensors")
    (tmp_path / "dino.json").write_text(json.dumps({"vision_heads": 3, "layer_norm_eps": 1e-6}))
    assert load_original(tmp_path / "dino.safetensors").config.num_attention_heads == 3
