"""The configuration that an original checkpoint was made with, read from its shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig, SwinConfig

from vlp_adapters.xvlm.configuration import XvlmPretrainConfig
from vlp_plugins.errors import UnsupportedError

_HEAD_WIDTH = 64  # of every published X-VLM with a CLIP ViT, and of BERT
_BERT = "text_encoder.bert."


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
    words = _get(state, _BERT + "embeddings.word_embeddings.weight")
    width = words.shape[1]
    layers = _layers(state, re.escape(_BERT) + r"encoder\.layer\.(\d+)\.attention\.")
    fusion = _layers(state, re.escape(_BERT) + r"encoder\.layer\.(\d+)\.crossattention\.")
    if not layers or not fusion:
        raise UnsupportedError(
            f"the checkpoint has {len(layers)} text layers, {len(fusion)} of them with "
            "cross-attention; an X-VLM pre-training checkpoint has both kinds"
        )
    intermediate = _get(state, _BERT + "encoder.layer.0.intermediate.dense.weight")
    text = BertConfig(
        vocab_size=words.shape[0],
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=text_heads or _heads(width, "text"),
        intermediate_size=intermediate.shape[0],
        max_position_embeddings=len(_get(state, _BERT + "embeddings.position_embeddings.weight")),
        type_vocab_size=len(_get(state, _BERT + "embeddings.token_type_embeddings.weight")),
        fusion_layer=min(fusion),
    )
    is_swin = "vision_encoder.patch_embed.proj.weight" in state
    return XvlmPretrainConfig(
        vision_config=_swin(state) if is_swin else _clip(state, vision_heads),
        text_config=text,
        embed_dim=_get(state, "text_proj.weight").shape[0],
    )


def _clip(state: Mapping[str, Tensor], heads: int | None) -> CLIPVisionConfig:
    patch = _get(state, "vision_encoder.patch_embed.weight")
    width, channels, patch_size, _ = patch.shape
    grid = math.isqrt(len(_get(state, "vision_encoder.pos_embed.weight")) - 1)
    layers = _layers(state, r"vision_encoder\.encoder\.layers\.(\d+)\.")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(_get(state, "vision_encoder.encoder.layers.0.mlp.fc1.bias")),
        num_hidden_layers=len(layers),
        num_attention_heads=heads or _heads(width, "vision"),
        num_channels=channels,
        image_size=grid * patch_size,
        patch_size=patch_size,
    )


def _swin(state: Mapping[str, Tensor]) -> SwinConfig:
    patch = _get(state, "vision_encoder.patch_embed.proj.weight")
    stages = _layers(state, r"vision_encoder\.layers\.(\d+)\.")
    blocks = [_layers(state, rf"vision_encoder\.layers\.{n}\.blocks\.(\d+)\.") for n in stages]
    tables = [
        _get(state, f"vision_encoder.layers.{n}.blocks.0.attn.relative_position_bias_table")
        for n in stages
    ]
    window = (math.isqrt(len(tables[0])) + 1) // 2  # the table has (2 window - 1)^2 rows
    hidden = _get(state, "vision_encoder.layers.0.blocks.0.mlp.fc1.weight")
    return SwinConfig(
        # Published sizes leave exactly one window in the last stage.
        image_size=patch.shape[2] * 2 ** (len(stages) - 1) * window,
        patch_size=patch.shape[2],
        num_channels=patch.shape[1],
        embed_dim=patch.shape[0],
        depths=[len(indices) for indices in blocks],
        num_heads=[table.shape[1] for table in tables],
        window_size=window,
        mlp_ratio=hidden.shape[0] / hidden.shape[1],
    )


def _layers(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The different indices that `pattern` captures at the start of names, sorted."""
    found = (re.match(pattern, name) for name in state)
    return sorted({int(match[1]) for match in found if match})


def _heads(width: int, tower: str) -> int:
    if width % _HEAD_WIDTH:
        raise UnsupportedError(
            f"the {tower} encoder is {width} wide, so its number of attention heads cannot be "
            f"guessed (published models have {_HEAD_WIDTH} per head); pass a configuration"
        )
    return width // _HEAD_WIDTH


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UnsupportedError(
            f"the checkpoint has no {name}: it is not an X-VLM pre-training checkpoint with a CLIP "
            "or Swin vision encoder"
        )
    return state[name]
