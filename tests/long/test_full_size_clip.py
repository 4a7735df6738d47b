"""MULTIFLOW once through CLIP ViT-B/32 and SigLIP base: real sizes, random weights, two batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.pruning import prune

pytestmark = pytest.mark.long

TOWERS = {  # adapter -> modality: layers x (query, key, value, output + two of the MLP)
    "clip": {
        "text": 12 * (4 * 512 * 512 + 2 * 512 * 2048),
        "vision": 12 * (4 * 768 * 768 + 2 * 768 * 3072),
    },
    "siglip": {
        "text": 12 * (4 * 768 * 768 + 2 * 768 * 3072),
        "vision": 12 * (4 * 768 * 768 + 2 * 768 * 3072),
    },
}
PARAMETERS = {"clip": 151_277_313, "siglip": 203_155_970}  # all, as published


@pytest.fixture(scope="module", params=TOWERS)
def model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    is_clip = request.param == "clip"
    made = CLIPModel(CLIPConfig()) if is_clip else SiglipModel(SiglipConfig())
    return request.param, made.eval()


def batches(family: str) -> list[dict[str, Tensor]]:
    """Two batches of two noise images and texts: CLIP's of 12 and 30 tokens, SigLIP's of 64."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        pixels = torch.randn(2, 3, 224, 224, generator=generator)
        ids = torch.randint(1000, 30000, (2, 30 if family == "clip" else 64), generator=generator)
        batch = {"pixel_values": pixels, "input_ids": ids}
        if family == "clip":
            mask = (torch.arange(30) < torch.tensor([[12], [30]])).long()
            ids[0, 11:], ids[1, 29:] = 49407, 49407
            batch["attention_mask"] = mask
        made.append(batch)
    return made


def test_the_prunable_weights_are_the_layers_of_both_towers(model) -> None:
    family, network = model
    found = inspect_model(network, registry().adapter_for(network))

    assert found.adapter == family
    assert {group.modality: group.elements for group in found.groups} == TOWERS[family]
    assert {group.layers for group in found.groups} == {12}
    assert found.parameters == PARAMETERS[family]
    assert "not declared by the adapter" not in {e.reason for e in found.excluded}


def test_multiflow_prunes_exactly_and_its_masks_survive_the_disk(model, tmp_path) -> None:
    family, network = model
    masks = prune(network, batches(family), method="multiflow", sparsity=0.75)

    for modality, elements in TOWERS[family].items():
        assert masks.counts().by_modality[modality].removed == 3 * elements // 4
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors") == masks
    masks.apply(network)
    assert masks.verify(network) == []
