"""The recorded ViT: how to rebuild it, its batches, and what it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification


def config_from_golden(folder: Path) -> ViTConfig:
    """The configuration of the recorded sizes."""
    sizes = json.loads((folder / "config.json").read_text())
    return ViTConfig(
        image_size=sizes["image_res"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        hidden_act=sizes["hidden_act"],
        layer_norm_eps=sizes["layer_norm_eps"],
        qkv_bias=sizes["qkv_bias"],
        num_labels=sizes["num_labels"],
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=sizes["dropout"],
    )


def model_from_golden(folder: Path) -> Any:
    """The recorded classifier in evaluation mode."""
    state = load_file(folder / "model.safetensors")
    config = config_from_golden(folder)
    model, report = ViTForImageClassification.from_pretrained(
        None, config=config, state_dict=state, trust_remote_code=False, output_loading_info=True
    )
    if any(report.values()):
        raise ValueError(f"{folder} does not fit: {report}")
    return model


def batches_from_golden(folder: Path, file: str = "batches.safetensors") -> list[dict[str, Tensor]]:
    """`pixel_values` `[B, 3, H, W]` and `labels` `[B]` of every recorded batch."""
    stored = load_file(folder / file)
    pairs = zip(stored["image"], stored["labels"], strict=True)
    return [{"pixel_values": image, "labels": labels} for image, labels in pairs]


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the recorded outputs, and the loss `ce`."""
    found = model(pixel_values=batch["pixel_values"], output_hidden_states=False)
    hidden = model.vit(pixel_values=batch["pixel_values"]).last_hidden_state
    return {
        "last_hidden_state": hidden,
        "logits": found.logits,
        "ce": functional.cross_entropy(found.logits, batch["labels"]),
    }
