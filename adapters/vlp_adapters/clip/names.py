"""Parameter names of CLIP in OpenAI's code base, open_clip and transformers.

OpenAI keeps query, key and value of a layer in one tensor, `attn.in_proj_weight`, and both
projections transposed. open_clip has the same names, or (CustomTextCLIP) `text.` in front of those
of the text tower; its SigLIP has the image tower of timm under `visual.trunk.`.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from vlp_adapters.names import rebegin, reverse
from vlp_plugins.models.adapter import OriginalPart

FUSED = ("q_proj", "k_proj", "v_proj")
"""The rows of `in_proj`, in this order."""
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
POOLING = "vision_model.head."
"""The attention that pools the image of SigLIP; OpenAI's CLIP has no name for it."""

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

# Beginnings of names, (OpenAI's, or ours where it has none; those of open_clip's SigLIP).
_TRUNK_LAYER = (
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_TRUNK = (
    ("visual.positional_embedding", "visual.trunk.pos_embed"),
    ("visual.conv1.", "visual.trunk.patch_embed.proj."),
    ("visual.ln_post.", "visual.trunk.norm."),
    (f"{POOLING}probe", "visual.trunk.attn_pool.latent"),
    (f"{POOLING}attention.out_proj.", "visual.trunk.attn_pool.proj."),
    (f"{POOLING}layernorm.", "visual.trunk.attn_pool.norm."),
    (f"{POOLING}mlp.", "visual.trunk.attn_pool.mlp."),
)
_PROJECTION = (("text_model.head.", "text.text_projection."),)
_BLOCK = re.compile(r"visual\.(?:transformer\.resblocks|trunk\.blocks)\.(\d+)\.(.+)")

_TEXT_SIGNS = ("token_embedding.weight", "transformer.resblocks.0.attn.in_proj_weight")
_TEXT = "text."

OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


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


def from_open_clip_name(name: str) -> str:
    """OpenAI's name of a parameter of open_clip; ours for what OpenAI's CLIP does not have."""
    if (match := _BLOCK.fullmatch(name)) and ".trunk." in name:
        return f"visual.transformer.resblocks.{match[1]}.{rebegin(match[2], reverse(_TRUNK_LAYER))}"
    return rebegin(name, (*reverse(_PROJECTION), *reverse(_TRUNK))).removeprefix(_TEXT)


def to_open_clip_name(name: str, *, trunk: bool) -> str:
    """The name in open_clip's SigLIP of what `from_open_clip_name` returns.

    Args:
        name: OpenAI's or ours.
        trunk: whether the image tower is timm's.
    """
    if trunk and (match := _BLOCK.fullmatch(name)):
        return f"visual.trunk.blocks.{match[1]}.{rebegin(match[2], _TRUNK_LAYER)}"
    named = rebegin(name, (*_PROJECTION, *(_TRUNK if trunk else ())))
    shared = named.startswith(("visual.", "logit_", POOLING, _TEXT))
    return named if shared else _TEXT + named


@dataclass(frozen=True)
class Format:
    """What a checkpoint is.

    Attributes:
        family: name of the adapter whose it is.
        title: what users call it.
        supported: whether it can be loaded.
        custom_text: whether the names are those of open_clip's CustomTextCLIP.
    """

    family: str
    title: str
    supported: bool = True
    custom_text: bool = False


def format_of(names: Set[str]) -> Format | None:
    """The format of a checkpoint of OpenAI's CLIP or of open_clip; None for any other."""
    starts = {name.partition(".")[0] for name in names}
    custom = "text" in starts
    if "visual" not in starts:
        return None
    if not names >= {_TEXT * custom + sign for sign in _TEXT_SIGNS}:
        if custom and "logit_scale" in names:
            title = "CLIP checkpoint of open_clip whose text tower is one of transformers"
            return Format("clip", title, supported=False)
        return None
    native = {"visual.proj", "visual.conv1.weight"} <= names
    trunk = any(name.startswith("visual.trunk.") for name in names)
    if "text_decoder" in starts:
        return Format("clip", "CoCa checkpoint of open_clip with a decoder", supported=False)
    if f"{_TEXT}text_projection.weight" in names:
        title = "SigLIP checkpoint of open_clip "
        if native:
            return Format("siglip", f"{title}with the vision transformer of CLIP")
        if "visual.trunk.attn_pool.latent" in names:
            return Format("siglip", f"{title}with the vision transformer of timm")
        return Format("siglip", f"{title}whose image tower is not SigLIP's", supported=False)
    title = (
        f"CLIP checkpoint of {'open_clip (CustomTextCLIP)' if custom else 'OpenAI or open_clip'} "
    )
    if native and "logit_bias" not in names:
        return Format("clip", f"{title}with a vision transformer", custom_text=custom)
    if native:
        why = "with a logit_bias, of the loss of SigLIP"
    elif any(name.startswith("visual.layer1.") for name in names):
        why = "whose image tower is a ResNet and no vision transformer"
    else:
        why = f"whose image tower is {'one of timm' if trunk else 'no vision transformer'}"
    return Format("clip", title + why, supported=False)


def checkpoint_file(source: Path) -> Path:
    """The checkpoint in a folder of open_clip without `config.json`; any other path as it is."""
    if (source / OPEN_CLIP_CONFIG).is_file() and not (source / "config.json").is_file():
        files = (source / name for name in _OPEN_CLIP_FILES)
        return next((file for file in files if file.is_file()), source)
    return source
