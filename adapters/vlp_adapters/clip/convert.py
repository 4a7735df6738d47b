"""CLIP checkpoints with OpenAI's names to transformers' `CLIPModel` and back."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vlp_adapters.checkpoints import check_fit, read_state
from vlp_adapters.clip.names import FUSED, TRANSPOSED, from_original_name, to_original_name
from vlp_adapters.shapes import CheckpointShapes, attention_heads
from vlp_plugins.runtime.errors import UnsupportedError, first_line

_log = logging.getLogger(__name__)

_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
_NOT_WEIGHTS = (*_OF_OPENAI, "attn_mask")
_PATCHES = "visual.conv1.weight"
_OPEN_CLIP = "open_clip_config.json"


def load_original(path: str | os.PathLike[str], **options: Any) -> CLIPModel:
    """Loads a checkpoint file with OpenAI's names into a `CLIPModel`, in evaluation mode.

    open_clip uses the same names for models with other activations and heads, which shapes do not
    tell: its `open_clip_config.json` next to the file does. Without it the activation is that of
    OpenAI, `quick_gelu`, if the file has the marks of OpenAI's (three numbers that are no weights,
    or half precision) or `quickgelu` in its name, and that of open_clip, `gelu`, otherwise. A
    warning says so where nothing but the lack of marks decides.

    Args:
        path: `.pt`, `.pth`, `.bin` or `.safetensors`; a state_dict, bare or under `model`. Half
            precision, in which OpenAI saves, becomes float32.
        **options: as of `infer_config`; they override that file.

    Raises:
        UnsupportedError: if the file cannot be read without running code in it (a TorchScript
            archive: the error says how to convert it), or its tensors do not fit.
    """
    original = read_state(path)
    beside = Path(path).parent / _OPEN_CLIP
    known = _open_clip_options(beside) if beside.is_file() else {}
    chosen = known | options
    if "hidden_act" not in chosen:
        chosen["hidden_act"] = _activation(Path(path), original)
    model = CLIPModel(infer_config(original, **chosen))
    state = state_from_original(original)
    check_fit(path, state, model.state_dict(), "CLIP", lambda name: to_original_name(name) or name)
    model.load_state_dict(state)
    loaded: CLIPModel = model.eval()
    return loaded


def infer_config(
    state: Mapping[str, Tensor],
    *,
    hidden_act: str = "quick_gelu",
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> CLIPConfig:
    """Reads sizes from tensors with OpenAI's names, as its `build_model` does.

    The end token is the last word of the vocabulary, the start token the one before it.

    Args:
        state: tensors by original name.
        hidden_act: OpenAI's is `quick_gelu`; most models of open_clip have `gelu`.
        vision_heads: heads per layer of the vision tower; None for width / 64.
        text_heads: heads per layer of the text tower; None for width / 64.

    Raises:
        UnsupportedError: if it is no CLIP, or the vision tower is no vision transformer.
    """
    shapes = CheckpointShapes(state, "CLIP")
    if "visual.proj" not in state or _PATCHES not in state:
        raise UnsupportedError(
            "the vision tower of this CLIP is a ResNet or some other network, which is not "
            "supported; take one of the models with a vision transformer (ViT-B-32, ViT-L-14, ...)"
        )
    vision_width, _, _, patch_size = shapes[_PATCHES]
    words, text_width = shapes["token_embedding.weight"]
    sizes = {"hidden_act": hidden_act, "projection_dim": shapes["text_projection"][1]}
    vision = {
        **sizes,
        "hidden_size": vision_width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": len(shapes.indices(r"visual\.transformer\.resblocks\.(\d+)\.")),
        "num_attention_heads": vision_heads or attention_heads(vision_width, "vision"),
        "image_size": shapes.grid("visual.positional_embedding") * patch_size,
        "patch_size": patch_size,
    }
    text = {
        **sizes,
        "hidden_size": text_width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": len(shapes.indices(r"transformer\.resblocks\.(\d+)\.")),
        "num_attention_heads": text_heads or attention_heads(text_width, "text"),
        "max_position_embeddings": shapes["positional_embedding"][0],
        "vocab_size": words,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
    return CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=sizes["projection_dim"]
    )


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of `CLIPModel`: fused ones split, projections transposed."""
    result: dict[str, Tensor] = {}
    for original, value in state.items():
        if original in _NOT_WEIGHTS:
            continue
        name = from_original_name(original)
        before, fused, kind = name.rpartition("in_proj_")
        if fused:
            parts = zip(FUSED, value.chunk(len(FUSED)), strict=True)
            result |= {f"{before}{part}.{kind}": rows for part, rows in parts}
        else:
            result[name] = value.T if name in TRANSPOSED else value
    return result


def state_to_original(model: CLIPModel) -> dict[str, Tensor]:
    """The state of `model` with OpenAI's names, on the CPU; what `clip.load` and open_clip read."""
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if original := to_original_name(name):
            result[original] = (value.T.contiguous() if name in TRANSPOSED else value).cpu()
        elif f".{FUSED[0]}." in name:  # stands for all three
            rows = [state[name.replace(FUSED[0], part)] for part in FUSED]
            fused = to_original_name(name.replace(f"{FUSED[0]}.", "in_proj_"))
            result[str(fused)] = torch.cat(rows).cpu()
    return result


def _activation(path: Path, state: Mapping[str, Tensor]) -> str:
    """That of OpenAI for its own files, and of open_clip for others, with a warning."""
    half = _PATCHES in state and state[_PATCHES].dtype == torch.float16
    if half or "quickgelu" in path.name.lower() or any(name in state for name in _OF_OPENAI):
        return "quick_gelu"
    _log.warning(
        "%s does not say its activation; assumed is gelu, as in most models of open_clip. If the "
        "weights come from OpenAI, whose activation is quick_gelu, the features are wrong: put a "
        '%s with {"model_cfg": {"quick_gelu": true}} next to the file, or call '
        'load_original(path, hidden_act="quick_gelu")',
        path,
        _OPEN_CLIP,
    )
    return "gelu"


def _open_clip_options(path: Path) -> dict[str, Any]:
    """Activation and heads that open_clip's configuration states."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        options: dict[str, Any] = {
            "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu"
        }
        if "vision_cfg" in config:
            vision = config["vision_cfg"]
            options["vision_heads"] = vision["width"] // vision.get("head_width", 64)
        if "text_cfg" in config:
            options["text_heads"] = config["text_cfg"]["heads"]
        return options
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"{path} is damaged or no configuration of open_clip: {first_line(error)}"
        ) from error
