"""DINOv2 with registers and SwiGLU, and DINOv3: names, original names, saved, pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_masks import random_masks
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from vlp_adapters.vit import ViTAdapter
from vlp_plugins.loading import load_model
from vlp_plugins.masks.published_files import export_published, import_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError

ADAPTER = ViTAdapter()
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GATED = {"use_swiglu_ffn": True}
PLAIN_MLP, GATED_MLP = ["fc1", "fc2"], ["gate", "up", "down"]


def second(kind: type[nn.Module], **options: Any) -> nn.Module:
    is_registered = "WithRegisters" in kind.__name__
    config = Dinov2WithRegistersConfig if is_registered else Dinov2Config
    torch.manual_seed(0)
    return kind(config(**SIZES, mlp_ratio=2, **options)).eval()


def third(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = DINOv3ViTConfig(**SIZES, intermediate_size=32, num_register_tokens=2, **options)
    return DINOv3ViTModel(config).eval()


MODELS = {
    "second": (lambda: second(Dinov2Model), PLAIN_MLP),
    "second-giant": (lambda: second(Dinov2Model, **GATED), GATED_MLP),
    "registers": (lambda: second(Dinov2WithRegistersModel), PLAIN_MLP),
    "registers-giant": (lambda: second(Dinov2WithRegistersModel, **GATED), GATED_MLP),
    "registers-classifier": (lambda: second(Dinov2WithRegistersForImageClassification), PLAIN_MLP),
    "third": (third, ["up", "down"]),
    "third-gated": (lambda: third(use_gated_mlp=True), GATED_MLP),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str]]:
    make, mlp = MODELS[request.param]
    return make(), mlp


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def test_a_layer_is_called_as_in_vit(case) -> None:
    model, mlp = case
    parts = [f"attention.{part}" for part in ("query", "key", "value", "output")]
    expected = {
        f"vision.{i}.{part}" for i in range(2) for part in [*parts, *map("mlp.{}".format, mlp)]
    }
    assert set(WeightMap.of(model, ADAPTER)) == expected


def test_original_names_are_those_that_transformers_saves(case, tmp_path: Path) -> None:
    """Its files keep the names of version 4; SwiGLU's gate and up are one tensor there."""
    model, _ = case
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    named = {path: ADAPTER.original_name(path) for path in model.state_dict()}
    assert {name for name in named.values() if name} == {n for n in saved if "weights_in" not in n}
    fused = {path.split(".")[-2] for path, name in named.items() if name is None}
    assert fused == ({"gate_proj", "up_proj"} if any("weights_in" in n for n in saved) else set())
    weights = WeightMap.of(model, ADAPTER)
    masks = random_masks(model, adapter=ADAPTER)
    export_published(masks, tmp_path / "masks.pth", weights, ADAPTER)
    masks.apply(model)
    model.save_pretrained(tmp_path / "masked")
    pruned = load_file(tmp_path / "masked" / "model.safetensors")
    for key, mask in torch.load(tmp_path / "masks.pth", weights_only=True).items():
        assert torch.equal(pruned[key.removesuffix("_pruning_mask")] != 0, mask != 0), key
    assert import_published(tmp_path / "masks.pth", weights, ADAPTER) == masks


def test_the_stream_is_the_forward_of_the_model(case) -> None:
    model, _ = case
    (stream,) = ADAPTER.streams(model, images())
    with torch.no_grad():
        found, expected = stream.run(), model(**images())
    assert dict(stream.real) == {"vision": None}
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_saved_model_is_loaded_claimed_and_pruned(case, tmp_path: Path) -> None:
    case[0].save_pretrained(tmp_path)
    model, adapter = load_model(str(tmp_path), device="cpu")
    assert adapter.name == "vit"
    masks = prune(model, [images()], sparsity=0.5)
    assert masks.removed == WeightMap.of(model, adapter).numel // 2
    masks.apply(model)
    assert masks.verify(model) == []


@pytest.mark.parametrize(
    "kind", [Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification]
)
@pytest.mark.parametrize("options", [{}, GATED])
def test_the_loss_of_a_classifier_reaches_every_prunable_weight(kind, options) -> None:
    model = second(kind, **options)
    batch = images() | {"labels": torch.tensor([0, 1])}
    (loss,) = ADAPTER.losses(model, batch).values()
    torch.testing.assert_close(loss, model(**batch).loss)
    loss.backward()
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


def test_masks_of_a_tower_fit_its_classifier() -> None:
    masks = prune(second(Dinov2WithRegistersModel), [images()], sparsity=0.5)
    classifier = second(Dinov2WithRegistersForImageClassification)
    masks.apply(classifier)
    assert masks.verify(classifier) == []


def test_a_tower_has_no_loss() -> None:
    with pytest.raises(UnsupportedError, match="DINOv3ViTModel has no classifier"):
        ADAPTER.losses(third(), images() | {"labels": torch.tensor([0, 1])})
