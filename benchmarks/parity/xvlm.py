"""The published X-VLM of a golden folder: model, batches and outputs under our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig, load_original
from vlp_plugins.models.adapter import Negatives


def model_from_golden(folder: Path) -> XvlmForPretraining:
    """The golden model, of the sizes in `config.json`, in evaluation mode."""
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = CLIPVisionConfig(
        image_size=sizes["image_res"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["vision_width"],
        num_hidden_layers=sizes["vision_num_hidden_layers"],
        num_attention_heads=sizes["vision_num_attention_heads"],
        intermediate_size=sizes["vision_intermediate_size"],
        hidden_act=sizes["vision_hidden_act"],
        layer_norm_eps=sizes["vision_layer_norm_eps"],
        attention_dropout=sizes["dropout"],
    )
    text = BertConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["text_width"],
        num_hidden_layers=sizes["text_num_hidden_layers"],
        num_attention_heads=sizes["text_num_attention_heads"],
        intermediate_size=sizes["text_intermediate_size"],
        hidden_act=sizes["text_hidden_act"],
        layer_norm_eps=sizes["text_layer_norm_eps"],
        max_position_embeddings=sizes["max_position_embeddings"],
        type_vocab_size=sizes["type_vocab_size"],
        pad_token_id=sizes["pad_token_id"],
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=sizes["dropout"],
    )
    options: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "fusion_layer": sizes["fusion_layer"],
        "embed_dim": sizes["embed_dim"],
        "temperature": sizes["temp"],
    }
    return load_original(folder / "model.safetensors", XvlmPretrainConfig(**options))


def batches_from_golden(folder: Path, file: str = "batches.safetensors") -> list[dict[str, Tensor]]:
    """The batches of a golden file in stored order, by the names of the model's forward.

    `masked_pos` is kept besides: int64 `[B, slots]`, the positions of `outputs`' `mlm_logits`,
    which the labels cannot tell because their order and padding are the published loader's.
    """
    stacked = load_file(folder / file)
    return [
        _ours({name: value[index] for name, value in stacked.items()})
        for index in range(len(stacked["image"]))
    ]


@torch.no_grad()
def outputs(
    model: XvlmForPretraining, batch: dict[str, Tensor], negatives: Negatives | None = None
) -> dict[str, Tensor]:
    """The tensors of `outputs.safetensors`, and the losses as `outputs.json` names them besides.

    Args:
        model: what `model_from_golden` returned.
        batch: one of `batches_from_golden`.
        negatives: recorded ones; None draws them from the global generator as the published code
            does, so that `torch.manual_seed(0)` before the first batch gives the recorded ones.
    """
    trained = model(
        **{name: value for name, value in batch.items() if name != "masked_pos"},
        negatives=negatives,
    )
    images, texts = (list(chosen) for chosen in trained.negatives)
    mask = batch["attention_mask"]
    image = model.encode_image(batch["pixel_values"])
    text = model.encode_text(batch["input_ids"], mask)
    words = model.fuse(model.encode_text(batch["mlm_input_ids"], mask), mask, image)
    rows = torch.arange(len(words))[:, None]
    return {
        "image_embeds": image,
        "text_embeds": text,
        "cross_embeds": model.fuse(text, mask, image),
        "image_feat": model.project_image(image),
        "text_feat": model.project_text(text),
        "itm_logits": model.match_logits(
            torch.cat([text, text, text[texts]]),
            torch.cat([mask, mask, mask[texts]]),
            torch.cat([image, image[images], image]),
        ),
        "mlm_logits": model.mlm_logits(words[rows, batch["masked_pos"]]),
        **trained.losses,
        **{f"loss.{name}": value.reshape(1) for name, value in trained.losses.items()},
        "loss.total": trained.loss.reshape(1),
    }


def _ours(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = torch.full_like(batch["text_ids"], IGNORED)
    row, slot = (batch["masked_ids"] != IGNORED).nonzero(as_tuple=True)
    labels[row, batch["masked_pos"][row, slot]] = batch["masked_ids"][row, slot]
    return {
        "pixel_values": batch["image"],
        "input_ids": batch["text_ids"],
        "attention_mask": batch["text_atts"],
        "mlm_input_ids": batch["text_ids_masked"],
        "mlm_labels": labels,
        "masked_pos": batch["masked_pos"],
    }
