"""Parameter names: the original X-VLM code base's and ours, both ways.

The text encoders, projections and heads have the original's names already; the vision encoders
have transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from torch import Tensor

from vlp_adapters.kinds import Kind
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
    ("embeddings.cls_token", "cls_token"),  # DeiT
    ("embeddings.position_embeddings", "pos_embed"),
)
_BLOCK = (  # of Swin and DeiT
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.o_proj.", "attn.proj."),
    ("attention.", "attn."),
)
_SWIN_LAYER = re.compile(r"(?:encoder\.)?(layers\.\d+\.(?:blocks\.\d+|downsample)\.)(.+)")
_DEIT_LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.(.+)")
_BIAS_TABLE = "relative_position_bias_table"
_OUR_BIAS_TABLE = f"relative_position_bias.{_BIAS_TABLE}"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_HEAD_BIAS = ".cls.predictions.bias"
_PATCHES = ("vision_encoder.patch_embed.weight", "vision_encoder.patch_embed.proj.weight")
_FIRST_LAYER = re.compile(
    r"text_(en|de)coder\.(\w+\.)?encoder\.layer\.0\.attention\.self\.query\.weight"
)
_COMPUTED = ("position_ids", "relative_position_index", "attn_mask")


def to_original_name(name: str) -> str:
    """The original name of a parameter of one of X-VLM's models.

    The separate projections of Swin and DeiT become `attn.q_proj`, `attn.k_proj`, `attn.v_proj`:
    the rows of the original's one `attn.qkv`, in this order.
    """
    if not (tail := _vision_part(name)):
        return name
    if layer := _SWIN_LAYER.fullmatch(tail):
        inner = rebegin(layer[2], _BLOCK).replace(_OUR_BIAS_TABLE, _BIAS_TABLE)
        return f"vision_encoder.{layer[1]}{inner}"
    if layer := _DEIT_LAYER.fullmatch(tail):
        return f"vision_encoder.blocks.{layer[1]}.{rebegin(layer[2], _BLOCK)}"
    return f"vision_encoder.{rebegin(tail, _VISION)}"


def from_original_name(name: str) -> str | None:
    """Our name of an original parameter; None for a buffer that is computed, not learned.

    Inverse of `to_original_name`. A `module.` in front (data-parallel training) is dropped.
    """
    name = name.removeprefix("module.")
    if name.rsplit(".", 1)[-1] in _COMPUTED:
        return None
    if name.endswith(_HEAD_BIAS):  # BERT's second name of the same parameter
        return name.removesuffix(_HEAD_BIAS) + ".cls.predictions.decoder.bias"
    if not (tail := _vision_part(name)):
        return name
    if layer := _SWIN_LAYER.fullmatch(tail):
        inner = layer[2].replace(_BIAS_TABLE, _OUR_BIAS_TABLE)
        return f"vision_encoder.encoder.{layer[1]}{rebegin(inner, reverse(_BLOCK))}"
    if layer := _DEIT_LAYER.fullmatch(tail):
        return f"vision_encoder.layers.{layer[1]}.{rebegin(layer[2], reverse(_BLOCK))}"
    return f"vision_encoder.{rebegin(tail, reverse(_VISION))}"


def is_original(names: Set[str]) -> bool:
    """True if these are the tensors of an original X-VLM checkpoint, of any task."""
    return not names.isdisjoint(_PATCHES) and any(map(_FIRST_LAYER.fullmatch, names))


def original_kind(names: Set[str]) -> Kind | None:
    """The model that an original X-VLM checkpoint is of; None if there is no class for it here."""
    parts = {".".join(name.split(".")[:2]) for name in names}
    heads = _heads(names)
    if "text_decoder.bert" in parts:
        return Kind.VQA if "text_encoder.encoder" in parts else Kind.CAPTIONING
    if "cls_head" in heads and "text_encoder.encoder" in parts:
        return Kind.NLVR
    if "itm_head" in heads and "text_encoder.encoder" in parts:
        return Kind.RETRIEVAL
    if "itm_head" in heads and "text_encoder.cls" in parts:
        return Kind.PRETRAINING
    return None


def description(names: Set[str]) -> str:
    """What an original X-VLM checkpoint is, as a noun phrase."""
    towers = {"pos_embed.weight": "CLIP", "cls_token": "DeiT"}
    known = (title for name, title in towers.items() if f"vision_encoder.{name}" in names)
    tower = f"{next(known, 'Swin')} image encoder"
    kind = original_kind(names)
    if kind is not None:
        return f"original X-VLM checkpoint of {kind}, {tower}"
    if any(".roberta." in name for name in names):
        return f"original X-VLM checkpoint with RoBERTa as text encoder, {tower}"
    if _heads(names) == {"bbox_head"}:
        return f"original X-VLM checkpoint of visual grounding, {tower}"
    return (
        f"original X-VLM checkpoint of another task ({', '.join(sorted(_heads(names)))}), {tower}"
    )


def _heads(names: Set[str]) -> set[str]:
    """What an original model has besides its encoders and projections."""
    parts = {name.split(".", 1)[0] for name in names}
    return {part for part in parts if not part.endswith(("_encoder", "_decoder", "_proj"))} - {
        "temp"
    }


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of Swin and DeiT: one matrix in the original, three in transformers.

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
    """Where the original keeps a parameter: projections of Swin and DeiT in `attn.qkv`."""
    original = to_original_name(name)
    for part, projection in enumerate(_PROJECTIONS):
        if f".attn.{projection}." in original:
            fused = original.replace(f".{projection}.", ".qkv.")
            return OriginalPart(fused, part, len(_PROJECTIONS))
    return OriginalPart(original)


def _vision_part(name: str) -> str:
    """What follows `vision_encoder.`; empty for other parameters."""
    return name.removeprefix("vision_encoder.") if name.startswith("vision_encoder.") else ""
