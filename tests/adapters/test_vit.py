"""ViT and DINO: names, claims, one modality, labels for gradients, original checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vlp_adapters.vit import ViTAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

ADAPTER = ViTAdapter()
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def tiny_vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=32, num_labels=3)).eval()


def tiny_dinov2(**options: Any) -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, **options)).eval()


def test_canonical_names_say_tower_layer_and_part() -> None:
    weights = WeightMap.of(tiny_vit(), ADAPTER)
    assert list(weights)[:6] == [
        "vision.0.attention.query",
        "vision.0.attention.key",
        "vision.0.attention.value",
        "vision.0.attention.output",
        "vision.0.mlp.fc1",
        "vision.0.mlp.fc2",
    ]
    assert list(weights.by_modality()) == ["vision"]
    assert [weight.depth for weight in weights.values()] == [0] * 6 + [1] * 6


def test_classifier_bare_tower_and_dinov2_have_the_same_names() -> None:
    names = list(WeightMap.of(tiny_vit(), ADAPTER))
    bare = ViTModel(ViTConfig(**SIZES, intermediate_size=32))
    assert list(WeightMap.of(bare, ADAPTER)) == names
    assert list(WeightMap.of(tiny_dinov2(), ADAPTER)) == names


def test_swiglu_has_three_mlp_weights() -> None:
    names = list(WeightMap.of(tiny_dinov2(use_swiglu_ffn=True), ADAPTER))
    assert names[4:7] == ["vision.0.mlp.gate", "vision.0.mlp.up", "vision.0.mlp.down"]
    assert len(names) == 14


def test_claims_its_classes_and_nothing_else() -> None:
    classifier = Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2))
    assert all(map(ADAPTER.claims, (tiny_vit(), tiny_vit().vit, tiny_dinov2(), classifier)))

    class Derived(ViTModel):
        pass

    assert ADAPTER.claims(Derived(ViTConfig(**SIZES, intermediate_size=32)))

    class ViTModelOfSomebodyElse(nn.Linear):
        pass

    ViTModelOfSomebodyElse.__qualname__ = "ViTModel"
    assert not ADAPTER.claims(ViTModelOfSomebodyElse(1, 1))


def test_listing_and_claiming_import_no_modelling_library() -> None:
    code = (
        "import sys; from torch import nn; from vlp_adapters.plugin import vlp_adapters;"
        "adapters = vlp_adapters(); assert set(adapters) > {'blip', 'clip', 'siglip', 'vit'};"
        "assert not any(make().claims(nn.Linear(1, 1)) for make in adapters.values());"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradient_methods_need_labels() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    with pytest.raises(BatchError, match=r"gradient methods need labelled batches.*pixel_values"):
        ADAPTER.losses(tiny_vit(), batch)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), r"2 integers.*\[3\]"),
        (torch.tensor([0.0, 1.0]), r"float32"),
        (torch.tensor([0, 3]), r"0 to 3; the model has 3 classes"),
        (torch.tensor([-1, 2]), r"-1 to 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, message: str) -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": labels}
    with pytest.raises(BatchError, match=message):
        ADAPTER.losses(tiny_vit(), batch)


def test_a_tower_without_classifier_has_no_loss() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    with pytest.raises(UnsupportedError, match="Dinov2Model has no classifier"):
        ADAPTER.losses(tiny_dinov2(), batch)


def test_a_batch_without_images_is_refused() -> None:
    with pytest.raises(BatchError, match="no pixel_values"):
        ADAPTER.streams(tiny_vit(), {"labels": torch.tensor([0])})


def test_wrapped_layers_are_refused() -> None:
    model = tiny_vit()
    model.vit.layers[1].mlp.fc1 = nn.Sequential(nn.Linear(16, 32))
    with pytest.raises(UnsupportedError, match=r"vit.layers.1.mlp.fc1 is a Sequential"):
        WeightMap.of(model, ADAPTER)


def test_collate_leaves_captions_out() -> None:
    def processor(**inputs: Any) -> dict[str, Any]:
        return inputs

    assert ADAPTER.collate(processor, (1, 2), ("a", "b")) == {  # type: ignore[arg-type]
        "images": [1, 2],
        "return_tensors": "pt",
    }


def test_dinov2_names_go_back_to_the_original() -> None:
    model = tiny_dinov2()
    state = {str(ADAPTER.original_name(k)): v for k, v in model.state_dict().items()}
    assert "encoder.layer.0.attention.attention.query.weight" in state
    assert "encoder.layer.1.mlp.fc2.weight" in state
    again = Dinov2Model.from_pretrained(None, config=model.config, state_dict=state)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("pooled", [True, False])
def test_original_vit_is_read_as_transformers_reads_it(tmp_path: Path, pooled: bool) -> None:
    config = ViTConfig(**SIZES, intermediate_size=32)
    model = ViTModel(config, add_pooling_layer=pooled)
    state = {str(ADAPTER.original_name(k)): v for k, v in model.state_dict().items()}
    ours = model.state_dict()
    config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    theirs = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_knows_no_downstream_task() -> None:
    with pytest.raises(UnsupportedError, match="vqa"):
        ADAPTER.for_task("vqa", tiny_vit())
