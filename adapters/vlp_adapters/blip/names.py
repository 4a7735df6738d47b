"""Parameter names: the original BLIP code base's and ours, both ways. Pure functions on strings.

The text towers, projections and heads have the original's names already; the vision encoder and
its momentum twin have transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Set

from vlp_adapters.kinds import Kind
from vlp_adapters.names import rebegin, reverse

# Beginnings of names, (ours, original), in a vision encoder and in one of its layers.
_VISION = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("post_layernorm.", "norm."),
)
_LAYER = (
    ("self_attn.qkv.", "attn.qkv."),
    ("self_attn.projection.", "attn.proj."),
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
)
_OURS = re.compile(r"vision_model(?P<twin>_m)?\.(?:encoder\.layers\.(?P<layer>\d+)\.)?(?P<tail>.+)")
_ORIGINAL = re.compile(r"visual_encoder(?P<twin>_m)?\.(?:blocks\.(?P<layer>\d+)\.)?(?P<tail>.+)")
_PATCHES = "visual_encoder.patch_embed.proj.weight"
_FIRST_LAYER = "encoder.layer.0.crossattention.self.query.weight"
_FIRST_OF_TWO_IMAGES = "text_encoder.encoder.layer.0.crossattention.self0.query.weight"
_FIRST_LAYERS = (
    f"text_encoder.{_FIRST_LAYER}", f"text_decoder.bert.{_FIRST_LAYER}", _FIRST_OF_TWO_IMAGES,
)  # fmt: skip
_COMMON_SPACE = ("text_proj.weight", "itm_head.weight")
HEAD_BIAS = "text_decoder.cls.predictions.decoder.bias"
SECOND_HEAD_BIAS = "text_decoder.cls.predictions.bias"
"""Another name of `HEAD_BIAS` in BERT."""


def to_original_name(name: str) -> str:
    """The original name of a parameter or buffer of `BlipForPretraining`."""
    if not (match := _OURS.fullmatch(name)):
        return _first_name(name)
    block = f"blocks.{match['layer']}." if match["layer"] else ""
    tail = rebegin(match["tail"], _LAYER if block else _VISION)
    return f"visual_encoder{match['twin'] or ''}.{block}{tail}"


def from_original_name(name: str) -> str | None:
    """Our name of an original parameter; None for a buffer that is computed, not learned.

    Inverse of `to_original_name`. A `module.` in front (data-parallel training) is dropped.
    """
    name = name.removeprefix("module.")
    if name.endswith(".position_ids"):
        return None
    if not (match := _ORIGINAL.fullmatch(name)):
        return _first_name(name)
    block = f"encoder.layers.{match['layer']}." if match["layer"] else ""
    tail = rebegin(match["tail"], reverse(_LAYER if block else _VISION))
    return f"vision_model{match['twin'] or ''}.{block}{tail}"


def is_original(names: Set[str]) -> bool:
    """True if these are the tensors of an original BLIP checkpoint, of any task."""
    return _PATCHES in names and not names.isdisjoint(_FIRST_LAYERS)


def task_of(names: Set[str]) -> Kind | None:
    """What an original checkpoint with tensors of these names is for; None if that is unknown."""
    if not is_original(names):
        return None
    if _FIRST_OF_TWO_IMAGES in names:
        return Kind.NLVR
    has_space = not names.isdisjoint(_COMMON_SPACE)
    has_encoder = any(name.startswith("text_encoder.") for name in names)
    if any(name.startswith("text_decoder.") for name in names):
        if has_space:
            return Kind.PRETRAINING
        return Kind.VQA if has_encoder else Kind.CAPTIONING
    return Kind.RETRIEVAL if has_space else None


def _first_name(name: str) -> str:
    return HEAD_BIAS if name == SECOND_HEAD_BIAS else name
