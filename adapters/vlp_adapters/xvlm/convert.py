"""Original X-VLM checkpoints to ours and back."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig, SwinConfig

from vlp_adapters.checkpoints import check_fit, read_state, write_state
from vlp_adapters.shapes import CheckpointShapes, attention_heads
from vlp_adapters.xvlm.configuration import XvlmPretrainConfig
from vlp_adapters.xvlm.modeling import XvlmForPretraining
from vlp_adapters.xvlm.names import from_original_name, fuse_qkv, split_qkv, to_original_name
from vlp_plugins.runtime.errors import UnsupportedError

_BERT = "text_encoder.bert."
_DECODER = "text_encoder.cls.predictions.decoder.weight"
_WORDS = "text_encoder.bert.embeddings.word_embeddings.weight"
_POSITIONS = {  # buffers of the original by the table that they number
    "vision_encoder.pos_embed.weight": "vision_encoder.position_ids",
    "text_encoder.bert.embeddings.position_embeddings.weight": (
        "text_encoder.bert.embeddings.position_ids"
    ),
}


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an original checkpoint; computed buffers are left out."""
    result: dict[str, Tensor] = {}
    for original, tensor in split_qkv(state).items():
        name = from_original_name(original)
        if name is not None:
            result[name] = tensor
    return result


def state_to_original(model: XvlmForPretraining) -> dict[str, Tensor]:
    """The state of `model` as the original code saves it, on the CPU.

    Includes the `position_ids` that the original expects. Swin's computed buffers are left out:
    the original code drops them when it loads.
    """
    state = {to_original_name(name): value.cpu() for name, value in model.state_dict().items()}
    result = fuse_qkv(state)
    for table, buffer in _POSITIONS.items():
        if table in result:
            result[buffer] = torch.arange(len(result[table]), device="cpu").expand(1, -1)
    return result


def load_original(
    path: str | os.PathLike[str], config: XvlmPretrainConfig | None = None
) -> XvlmForPretraining:
    """Loads an original X-VLM pre-training checkpoint, in evaluation mode.

    Args:
        path: `.pth` with `{"model": state_dict}`, a bare state_dict, or `.safetensors`.
        config: sizes; None to read them from the shapes (see `infer_config`).

    Raises:
        UnsupportedError: if the file cannot be read, or its tensors do not fit the model.
    """
    original = read_state(path)
    model = XvlmForPretraining(config or infer_config(original))
    state = state_from_original(original)
    state.setdefault(_DECODER, state.get(_WORDS, torch.empty(0)))  # tied: saved once or twice
    expected = model.state_dict()
    check_fit(path, state, expected, "X-VLM pre-training", to_original_name)
    if not torch.equal(state[_DECODER], state[_WORDS]):
        raise UnsupportedError(
            f"{path}: the MLM decoder differs from the word embeddings, which X-VLM ties"
        )
    model.load_state_dict(state)
    return model.eval()


def infer_config(
    state: Mapping[str, Tensor], *, vision_heads: int | None = None, text_heads: int | None = None
) -> XvlmPretrainConfig:
    """Reads sizes from the tensors of an original checkpoint (original names).

    Shapes do not tell the number of attention heads of BERT and CLIP: it is taken as width / 64,
    which holds for the published sizes. Swin's can be read. Activations are the published ones
    (`quick_gelu` in CLIP, `gelu` elsewhere).

    Args:
        state: tensors by original name.
        vision_heads: heads per layer of a CLIP encoder; None for width / 64.
        text_heads: heads per layer of the text encoder; None for width / 64.

    Raises:
        UnsupportedError: if it is no X-VLM pre-training checkpoint, or the number of heads is
            needed.
    """
    shapes = CheckpointShapes(state, "X-VLM")
    words, width = shapes[_BERT + "embeddings.word_embeddings.weight"]
    layers = shapes.indices(re.escape(_BERT) + r"encoder\.layer\.(\d+)\.attention\.")
    fusion = shapes.indices(re.escape(_BERT) + r"encoder\.layer\.(\d+)\.crossattention\.")
    if not layers or not fusion:
        raise UnsupportedError(
            f"the checkpoint has {len(layers)} text layers, {len(fusion)} of them with "
            "cross-attention; an X-VLM pre-training checkpoint has both kinds"
        )
    text = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=text_heads or attention_heads(width, "text"),
        intermediate_size=shapes[_BERT + "encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes[_BERT + "embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes[_BERT + "embeddings.token_type_embeddings.weight"][0],
        fusion_layer=min(fusion),
    )
    is_swin = "vision_encoder.patch_embed.proj.weight" in state
    return XvlmPretrainConfig(
        vision_config=_swin(shapes) if is_swin else _clip(shapes, vision_heads),
        text_config=text,
        embed_dim=shapes["text_proj.weight"][0],
    )


def save_original(model: XvlmForPretraining, path: str | os.PathLike[str]) -> None:
    """Writes `model` in the original format: `{"model": state_dict}`, or `.safetensors`."""
    write_state(state_to_original(model), path)


def _clip(shapes: CheckpointShapes, heads: int | None) -> CLIPVisionConfig:
    width, channels, patch_size, _ = shapes["vision_encoder.patch_embed.weight"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["vision_encoder.encoder.layers.0.mlp.fc1.bias"][0],
        num_hidden_layers=len(shapes.indices(r"vision_encoder\.encoder\.layers\.(\d+)\.")),
        num_attention_heads=heads or attention_heads(width, "vision"),
        num_channels=channels,
        image_size=shapes.grid("vision_encoder.pos_embed.weight") * patch_size,
        patch_size=patch_size,
    )


def _swin(shapes: CheckpointShapes) -> SwinConfig:
    width, channels, patch_size, _ = shapes["vision_encoder.patch_embed.proj.weight"]
    stages = shapes.indices(r"vision_encoder\.layers\.(\d+)\.")
    blocks = [shapes.indices(rf"vision_encoder\.layers\.{n}\.blocks\.(\d+)\.") for n in stages]
    tables = [
        shapes[f"vision_encoder.layers.{n}.blocks.0.attn.relative_position_bias_table"]
        for n in stages
    ]
    window = (math.isqrt(tables[0][0]) + 1) // 2  # the table has (2 window - 1)^2 rows
    hidden, inputs = shapes["vision_encoder.layers.0.blocks.0.mlp.fc1.weight"]
    return SwinConfig(
        # Published sizes leave exactly one window in the last stage.
        image_size=patch_size * 2 ** (len(stages) - 1) * window,
        patch_size=patch_size,
        num_channels=channels,
        embed_dim=width,
        depths=[len(indices) for indices in blocks],
        num_heads=[heads for _, heads in tables],
        window_size=window,
        mlp_ratio=hidden / inputs,
    )
