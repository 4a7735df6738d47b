"""Parameter names of CLIP: OpenAI's code base and transformers, both ways. Pure functions.

OpenAI keeps query, key and value of a layer in one tensor, `attn.in_proj_weight`, and both
projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Set

from vlp_adapters.names import rebegin, reverse
from vlp_plugins.models.adapter import OriginalPart

FUSED = ("q_proj", "k_proj", "v_proj")
"""The rows of `in_proj`, in this order."""
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")

# Beginnings of names, (ours, original).
_LAYER = (
    ("self_attn.out_proj.", "attn.out_proj."),
    ("self_attn.in_proj_", "attn.in_proj_"),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
_OUTSIDE = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    ("logit_scale", "logit_scale"),
)
_OURS = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_ORIGINAL = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_HALVES = re.compile(rf"self_attn\.({'|'.join(FUSED)})\.")
_SIGNS = ("token_embedding.weight", "transformer.resblocks.0.attn.in_proj_weight")


def to_original_name(path: str) -> str | None:
    """OpenAI's name of a parameter of `CLIPModel`, or of a tower's class with a projection.

    None for query, key and value, which have no tensor of their own there (see `original_part`).
    None also for what OpenAI's CLIP does not have, a classifier, and for a bare tower, whose paths
    do not say which of the two it is.
    """
    if match := _OURS.fullmatch(path):
        tower, index, tail = match.groups()
        if _HALVES.match(tail):
            return None
        visual = "visual." if tower == "vision" else ""
        return f"{visual}transformer.resblocks.{index}.{rebegin(tail, _LAYER)}"
    original = rebegin(path, _OUTSIDE)
    return original if original != path or path == "logit_scale" else None


def original_part(path: str) -> OriginalPart | None:
    """Where OpenAI keeps a parameter: a third of `attn.in_proj_*` for query, key and value."""
    if match := _HALVES.search(path):
        name = to_original_name(path.replace(match[0], "self_attn.in_proj_"))
        part, of = FUSED.index(match[1]), len(FUSED)
    else:
        name, part, of = to_original_name(path), 0, 1
    return None if name is None else OriginalPart(name, part, of)


def from_original_name(name: str) -> str:
    """Our name of an original parameter.

    `attn.in_proj_weight` becomes `self_attn.in_proj_weight`, which stands for three; a name that
    is not CLIP's stays as it is.
    """
    if match := _ORIGINAL.fullmatch(name):
        tower = "vision" if match[1] else "text"
        tail = rebegin(match[3], reverse(_LAYER))
        return f"{tower}_model.encoder.layers.{match[2]}.{tail}"
    return rebegin(name, reverse(_OUTSIDE))


def is_original(names: Set[str]) -> bool:
    """True if these are the tensors of a CLIP of OpenAI's or open_clip's, with any vision tower."""
    return names >= {*_SIGNS} and any(name.startswith("visual.") for name in names)
