"""The published BLIP of a golden folder: model, batches and outputs under our names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig, load_original
from vlp_plugins.models.adapter import Negatives

_PUBLISHED = {"itc": "ita"}  # our name of a loss -> the recorded one


def model_from_golden(folder: Path) -> BlipForPretraining:
    """The golden model, of the sizes in `config.json`, in evaluation mode."""
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = BlipVisionConfig(
        image_size=sizes["image_res"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["vision_width"],
        num_hidden_layers=sizes["vision_num_hidden_layers"],
        num_attention_heads=sizes["vision_num_attention_heads"],
        intermediate_size=sizes["vision_width"] * sizes["vision_mlp_ratio"],
        hidden_act=sizes["vision_hidden_act"],
        layer_norm_eps=sizes["vision_layer_norm_eps"],
        attention_dropout=sizes["dropout"],
    )
    text = BlipTextConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["text_width"],
        num_hidden_layers=sizes["text_num_hidden_layers"],
        num_attention_heads=sizes["text_num_attention_heads"],
        intermediate_size=sizes["text_intermediate_size"],
        hidden_act=sizes["text_hidden_act"],
        layer_norm_eps=sizes["text_layer_norm_eps"],
        max_position_embeddings=sizes["max_position_embeddings"],
        bos_token_id=sizes["bos_token_id"],
        pad_token_id=sizes["pad_token_id"],
        sep_token_id=sizes["sep_token_id"],
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=sizes["dropout"],
    )
    config = BlipPretrainConfig(
        vision_config=vision,
        text_config=text,
        embed_dim=sizes["embed_dim"],
        queue_size=sizes["queue_size"],
        momentum=sizes["momentum"],
        temperature=sizes["temp"],
        alpha=sizes["itm_alpha"],
        label_smoothing=sizes["lm_label_smoothing"],
        dec_token_id=sizes["bos_token_id"],
        enc_token_id=sizes["enc_token_id"],
    )
    return load_original(folder / "model.safetensors", config)


def batches_from_golden(folder: Path, file: str = "batches.safetensors") -> list[dict[str, Tensor]]:
    """The batches of a golden file in stored order, by the names of the model's forward."""
    stacked = load_file(folder / file)
    names = {"pixel_values": "image", "input_ids": "text_ids", "attention_mask": "text_atts"}
    return [
        {ours: stacked[theirs][index] for ours, theirs in names.items()}
        for index in range(len(stacked["image"]))
    ]


@torch.no_grad()
def outputs(
    model: BlipForPretraining, batch: dict[str, Tensor], negatives: Negatives | None = None
) -> dict[str, Tensor]:
    """The tensors of `outputs.safetensors`, and the losses as `outputs.json` names them besides.

    Queues and momentum copies advance by one batch with every call, as they did when the batches
    were recorded one after the other.

    Args:
        model: what `model_from_golden` returned.
        batch: one of `batches_from_golden`.
        negatives: recorded ones; None draws them from the global generator as the published code
            does, so that `torch.manual_seed(0)` before the first batch gives the recorded ones.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    trained = model(**batch, negatives=negatives)
    image = model.encode_image(batch["pixel_values"])
    text = model.encode_text(ids, mask)
    images, texts = (list(chosen) for chosen in trained.negatives)
    wrong = (torch.cat([ids, ids[texts]]), torch.cat([mask, mask[texts]]))
    wrong_images = torch.cat([image[images], image])
    losses = {_PUBLISHED.get(name, name): value for name, value in trained.losses.items()}
    return {
        "image_embeds": image,
        "text_embeds": text,
        "cross_embeds": model.fuse(ids, mask, image),
        "cross_embeds_neg": model.fuse(*wrong, wrong_images),
        "image_feat": model.project_image(image),
        "text_feat": model.project_text(text),
        "itm_logits": torch.cat(
            [model.match_logits(ids, mask, image), model.match_logits(*wrong, wrong_images)]
        ),
        "decoder_logits": model.decode(ids, mask, image),
        **{
            f"{name}_after": value.clone()
            for name, value in model.named_buffers()
            if "queue" in name
        },
        **losses,
        **{f"loss.{name}": value.reshape(1) for name, value in losses.items()},
        "loss.total": trained.loss.reshape(1),
    }
