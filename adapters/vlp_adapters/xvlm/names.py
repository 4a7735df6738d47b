"""Parameter names: the original X-VLM code base's and ours, both ways.

The text encoder, projections and heads have the original's names already; the vision encoders
have transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from vlp_adapters.names import rebegin, reverse
from vlp_plugins.models.adapter import OriginalPart

# Beginnings of names, (ours, original); the first that matches counts.
_VISION = (
    ("embeddings.class_embedding", "class_embedding"),  # CLIP
    ("embeddings.position_embedding.", "pos_embed."),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),  # Swin
    ("embeddings.norm.", "patch_embed.norm."),
    ("layernorm.", "norm."),
    ("embeddings.patch_embedding.", "patch_embed."),  # CLIP, after Swin's longer originals
)
_SWIN_BLOCK = (
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.o_proj.", "attn.proj."),
    ("attention.", "attn."),
)
_SWIN_LAYER = re.compile(r"(?:encoder\.)?(layers\.\d+\.(?:blocks\.\d+|downsample)\.)(.+)")
_BIAS_TABLE = "relative_position_bias_table"
_OUR_BIAS_TABLE = f"relative_position_bias.{_BIAS_TABLE}"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_HEADS = frozenset({"vision_proj.weight", "text_proj.weight", "itm_head.0.weight", "temp"})
_PATCHES = (  # original names: CLIP ViT, Swin
    "vision_encoder.patch_embed.weight",
    "vision_encoder.patch_embed.proj.weight",
)
_FIRST_LAYER = "text_encoder.bert.encoder.layer.0.attention.self.query.weight"
_COMPUTED = ("position_ids", "relative_position_index", "attn_mask")


def to_original_name(name: str) -> str:
    """The original name of a parameter of `XvlmForPretraining`.

    Swin's separate projections become `attn.q_proj`, `attn.k_proj`, `attn.v_proj`: the rows of the
    original's one `attn.qkv`, in this order.
    """
    if not (tail := _vision_part(name)):
        return name
    if layer := _SWIN_LAYER.fullmatch(tail):
        inner = rebegin(layer[2], _SWIN_BLOCK).replace(_OUR_BIAS_TABLE, _BIAS_TABLE)
        return f"vision_encoder.{layer[1]}{inner}"
    return f"vision_encoder.{rebegin(tail, _VISION)}"


def from_original_name(name: str) -> str | None:
    """Our name of an original parameter; None for a buffer that is computed, not learned.

    Inverse of `to_original_name`. A `module.` in front (data-parallel training) is dropped.
    """
    name = name.removeprefix("module.")
    if name.rsplit(".", 1)[-1] in _COMPUTED:
        return None
    if name == "text_encoder.cls.predictions.bias":  # BERT's second name of the same parameter
        return "text_encoder.cls.predictions.decoder.bias"
    if not (tail := _vision_part(name)):
        return name
    if layer := _SWIN_LAYER.fullmatch(tail):
        inner = layer[2].replace(_BIAS_TABLE, _OUR_BIAS_TABLE)
        return f"vision_encoder.encoder.{layer[1]}{rebegin(inner, reverse(_SWIN_BLOCK))}"
    return f"vision_encoder.{rebegin(tail, reverse(_VISION))}"


def is_original(names: Set[str]) -> bool:
    """True if these are the tensors of an original X-VLM pre-training checkpoint."""
    return names >= _HEADS and _FIRST_LAYER in names and not names.isdisjoint(_PATCHES)


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swin's query, key and value, which the original keeps in one matrix and transformers apart.

    Replaces every `attn.qkv.*` (first dimension `3 D`) by `attn.{q,k,v}_proj.*` (`D` each).
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            result[name] = tensor
            continue
        for projection, rows in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
            result[name.replace(".qkv.", f".{projection}.")] = rows.clone()
    return result


def original_part(name: str) -> OriginalPart:
    """Where the original keeps a parameter: a third of `attn.qkv` for Swin's projections."""
    original = to_original_name(name)
    for part, projection in enumerate(_PROJECTIONS):
        if f".attn.{projection}." in original:
            fused = original.replace(f".{projection}.", ".qkv.")
            return OriginalPart(fused, part, len(_PROJECTIONS))
    return OriginalPart(original)


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `split_qkv`."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}.")] for part in _PROJECTIONS]
            result[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            result[name] = tensor
    return result


def _vision_part(name: str) -> str:
    """What follows `vision_encoder.`; empty for other parameters."""
    return name.removeprefix("vision_encoder.") if name.startswith("vision_encoder.") else ""
