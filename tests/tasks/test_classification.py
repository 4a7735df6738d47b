"""Top-k accuracy of classifiers."""

from __future__ import annotations

import pytest
import torch
from pair_model import PairAdapter, PairModel
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vlp_adapters.clip.adapter import ClipAdapter
from vlp_adapters.vit import ViTAdapter
from vlp_plugins.runtime.errors import BatchError, DataError, UnsupportedError
from vlp_plugins.tasks.classification import classification

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


def vit(classes: int = 7) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, num_labels=classes))


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    draw = torch.manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(5, 3, 16, 16, generator=draw),
            "labels": torch.randint(7, (5,), generator=draw),
        }
        for _ in range(count)
    ]


def test_top_k_is_the_share_whose_class_is_among_the_first_k() -> None:
    model = vit().train()
    found = classification(model, ViTAdapter(), batches(), ks=(1, 3, 7))
    right = dict.fromkeys((1, 3, 7), 0)
    model.eval()
    for batch in batches():
        order = model(batch["pixel_values"]).logits.argsort(dim=1, descending=True)
        for k in right:
            right[k] += int((order[:, :k] == batch["labels"][:, None]).any(dim=1).sum())
    assert found.top == {k: pytest.approx(100 * count / 15) for k, count in right.items()}
    assert found.top[7] == 100
    assert found.images == 15


def test_the_mode_of_the_model_stays() -> None:
    model = vit().train()
    classification(model, ViTAdapter(), batches(1))
    assert model.training


def test_a_collapsed_classifier_finds_nothing() -> None:
    model = vit()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    assert classification(model, ViTAdapter(), batches()).top == {1: 0, 5: 0}
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    assert classification(model, ViTAdapter(), batches()).top == {1: 0, 5: 0}


def test_a_clip_classifier() -> None:
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=SIZES, num_labels=7)
    found = classification(CLIPForImageClassification(config), ClipAdapter(), batches(), ks=(7,))
    assert found.top == {7: 100}


def test_what_cannot_be_measured_says_so() -> None:
    with pytest.raises(UnsupportedError, match="does not say how its models classify"):
        classification(PairModel(), PairAdapter(), batches())
    with pytest.raises(UnsupportedError, match="ViTModel has no classifier"):
        classification(ViTModel(ViTConfig(**SIZES)), ViTAdapter(), batches())
    with pytest.raises(BatchError, match="from 2 to 6 do not fit 5 images and 3 classes"):
        classification(vit(3), ViTAdapter(), batches())
    with pytest.raises(BatchError, match="batch has no labels"):
        classification(vit(), ViTAdapter(), [{"pixel_values": torch.zeros(1, 3, 16, 16)}])
    with pytest.raises(DataError, match="no batches"):
        classification(vit(), ViTAdapter(), [])
    with pytest.raises(DataError, match="cut-offs from 1 on"):
        classification(vit(), ViTAdapter(), batches(), ks=(0,))
