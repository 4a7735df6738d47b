"""Checkpoints of OpenAI's CLIP, and of open_clip's CLIP and SigLIP, from and to transformers."""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.initialization import no_init_weights

from vlp_adapters.checkpoints import check_fit, joined, options_of, read_state, write_state
from vlp_adapters.clip.modeling import SiglipWithClipVision, SiglipWithClipVisionConfig
from vlp_adapters.clip.names import (
    FUSED,
    OPEN_CLIP_CONFIG,
    POOLING,
    TRANSPOSED,
    Format,
    checkpoint_file,
    format_of,
    from_open_clip_name,
    from_original_name,
    original_part,
    to_open_clip_name,
)
from vlp_adapters.shapes import CheckpointShapes, attention_heads, check_options, shapes_of
from vlp_plugins.models.adapter import OriginalPart
from vlp_plugins.runtime.errors import UnsupportedError, first_line

_log = logging.getLogger(__name__)

OPTIONS = ("hidden_act", "text_act", "text_eps", "vision_heads", "text_heads")
"""Keywords of `load_original`: what shapes do not tell."""
_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
_NOT_WEIGHTS = (*_OF_OPENAI, "attn_mask")
_PATCHES = "visual.conv1.weight"
_POOL = "visual.trunk.attn_pool."
_NEVER_HALF = ("ln_", "embedding", "logit_")
_CUSTOM_TEXT = "open_clip_custom_text"
_SCALARS = ("logit_scale", "logit_bias")
# Image towers of SigLIP whose activation timm changed; all others have the exact gelu.
_TANH_TOWERS = (
    "vit_base_patch32_siglip",
    "vit_large_patch16_siglip_512",
    "vit_so400m_patch16_siglip",
    "vit_giantopt",
)
_TANH = "gelu_pytorch_tanh"
_SIGLIP_WIDTHS = (1152, 1536)  # of SO400M and giant-opt, which have 16 heads
_SIGLIP_HEADS = 16
_SIGLIP_EPS = 1e-6
_SIGLIP_HEAD = "text_model.head.weight"
_TORCH_EPS = 1e-5


def load_original(
    path: str | os.PathLike[str],
    config: CLIPConfig | SiglipConfig | None = None,
    **options: Any,
) -> CLIPModel | SiglipModel:
    """Loads a checkpoint of OpenAI's CLIP or of open_clip, in evaluation mode.

    A SigLIP of open_clip becomes a `SiglipModel` (or a `SiglipWithClipVision`, if its image tower
    is that of CLIP), any other a `CLIPModel`.

    Shapes do not tell activations and heads. They are taken from the keywords, else from a `.json`
    file with the name of the checkpoint, else from open_clip's `open_clip_config.json` in its
    folder. Without these there are `width / 64` heads, and the activation is that of OpenAI,
    `quick_gelu`, if the file has the marks of OpenAI's (three numbers that are no weights, or half
    precision) or `quickgelu` in its name, and `gelu` otherwise, with a warning.

    Args:
        path: `.pt`, `.pth`, `.bin` or `.safetensors` with the state_dict, bare or in a training
            file, or a downloaded folder of open_clip. Half precision, in which OpenAI saves,
            becomes float32.
        config: sizes; None reads them from the shapes.
        **options: `hidden_act`, `vision_heads`, `text_heads`; of SigLIP also `text_act` and
            `text_eps`, where the text tower has another activation, or epsilon of the layer norms.

    Raises:
        UnsupportedError: if the file cannot be read without running code in it (a TorchScript
            archive: the error says how to convert it), or its tensors do not fit.
    """
    path = checkpoint_file(Path(path))
    original = read_state(path)
    form = format_of(original.keys())
    if form is None:
        raise UnsupportedError(f"{path} is no checkpoint of OpenAI's CLIP or of open_clip")
    if not form.supported:
        raise UnsupportedError(
            f"{path} is a {form.title}, which is not supported; take a model with a vision "
            "transformer (ViT-B-32, ViT-L-14, ViT-B-16-SigLIP, ...) or, if transformers has this "
            "one, its folder with config.json"
        )
    title = "SigLIP" if form.family == "siglip" else "CLIP"
    said = options_of(path, OPTIONS, options, config)
    with shapes_of(path, title):
        if config is None:
            config = _inferred(path, original, form, said)
        with no_init_weights():  # all are loaded
            model: CLIPModel | SiglipModel = _class_of(config)(config)
        state = state_from_original(original)
        check_fit(path, state, model.state_dict(), title, _name_in(original, form))
        model.load_state_dict(state)
    return model.eval()


def save_original(
    model: CLIPModel | SiglipModel, path: str | os.PathLike[str], *, half: bool = False
) -> None:
    """Writes the state of a model with its original names.

    It is a bare state_dict, which OpenAI's `clip.load` and open_clip read.

    Args:
        model: as `load_original` returns it.
        path: `.safetensors`, or any other ending for a PyTorch file.
        half: in half precision what OpenAI keeps so: all but norms, embeddings and temperature.
    """
    state = state_to_original(model)
    if half:
        kept = {name for name in state if any(part in name for part in _NEVER_HALF)}
        state = {n: value if n in kept else value.half() for n, value in state.items()}
    write_state(state, path, key=None)


def infer_config(
    state: Mapping[str, Tensor],
    *,
    hidden_act: str | None = None,
    text_act: str | None = None,
    text_eps: float | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> CLIPConfig | SiglipConfig:
    """Reads sizes from tensors by their original names, as OpenAI's `build_model` does.

    The end token of CLIP is the last word of the vocabulary, the start token the one before it.

    Args:
        state: tensors by original name.
        hidden_act: OpenAI's is `quick_gelu`, the default of CLIP; most models of open_clip have
            `gelu`, the default of SigLIP.
        text_act: of the text tower; None for `hidden_act`.
        text_eps: of the layer norms of the text tower; None for 1e-5, of SigLIP 1e-6.
        vision_heads: heads per layer of the vision tower; None for width / 64, and 16 for the
            published widths 1152 and 1536 of SigLIP.
        text_heads: the same of the text tower.

    Raises:
        UnsupportedError: if it is neither CLIP nor SigLIP, or the heads cannot be guessed.
    """
    native = _native(state)
    is_siglip = _SIGLIP_HEAD in native
    is_pooled = is_siglip and f"{POOLING}probe" in native
    shapes = CheckpointShapes(native, "SigLIP" if is_siglip else "CLIP")
    vision, text = _vision(shapes), _text(shapes)
    width = shapes[_SIGLIP_HEAD][0] if is_siglip else shapes["text_projection"][1]
    if hidden_act is None:
        hidden_act = "gelu" if is_siglip else "quick_gelu"
    if text_eps is None:
        text_eps = _SIGLIP_EPS if is_siglip else _TORCH_EPS
    check_options({"hidden_act": hidden_act, "text_act": text_act, "text_eps": text_eps}, {})
    heads = _siglip_heads if is_siglip else attention_heads
    of_vision = heads if is_pooled else attention_heads
    vision |= {
        "hidden_act": hidden_act,
        "num_attention_heads": of_vision(vision["hidden_size"], "vision", vision_heads),
    }
    text |= {
        "hidden_act": text_act or hidden_act,
        "layer_norm_eps": text_eps,
        "num_attention_heads": heads(text["hidden_size"], "text", text_heads),
        # Those that transformers has for SigLIP are of another vocabulary.
        "bos_token_id": None if is_siglip else text["vocab_size"] - 2,
        "eos_token_id": None if is_siglip else text["vocab_size"] - 1,
        "projection_size" if is_siglip else "projection_dim": width,
    }
    if is_pooled:
        return SiglipConfig(vision_config=vision, text_config=text)
    vision["projection_dim"] = width
    if is_siglip:
        return SiglipWithClipVisionConfig(vision_config=vision, text_config=text)
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names: fused ones split, projections transposed."""
    result: dict[str, Tensor] = {}
    native = _native(state)
    is_siglip = _SIGLIP_HEAD in native
    for original, value in native.items():
        if original in _NOT_WEIGHTS:
            continue
        name = from_original_name(original)
        before, fused, kind = name.rpartition("self_attn.in_proj_")
        if fused:
            parts = zip(FUSED, value.chunk(len(FUSED)), strict=True)
            result |= {f"{before}self_attn.{part}.{kind}": rows for part, rows in parts}
        elif name in TRANSPOSED:
            turned = value.T if value.ndim == 2 else value  # `check_fit` says so of others
            result[f"{POOLING}weight" if is_siglip else name] = turned
        else:
            result[name] = value
    if is_siglip:
        result |= {name: result[name].reshape(1) for name in _SCALARS if name in result}
    return result


def state_to_original(model: CLIPModel | SiglipModel) -> dict[str, Tensor]:
    """The state of `model` with its original names, on the CPU.

    A `CLIPModel` has OpenAI's, or those of open_clip's CustomTextCLIP if it was loaded from such a
    file.
    """
    result = joined(model.state_dict(), lambda name: original_part(name) or OriginalPart(name))
    result |= {name: result[name].reshape(()) for name in _SCALARS if name in result}
    is_siglip = isinstance(model, SiglipModel)
    trunk = is_siglip and not isinstance(model, SiglipWithClipVision)
    if is_siglip and not trunk:
        result["visual.proj"] = result.pop(f"{POOLING}weight")
    for name in ("visual.proj", "text_projection"):
        if name in result:
            result[name] = result[name].T.contiguous()
    if not (is_siglip or getattr(model.config, _CUSTOM_TEXT, False)):
        return result
    result = {to_open_clip_name(name, trunk=trunk): value for name, value in result.items()}
    if trunk:
        positions = "visual.trunk.pos_embed"
        result[positions] = result[positions][None]
        for kind in ("weight", "bias"):
            rows = result.pop(f"{POOLING}attention.in_proj_{kind}").chunk(3)
            result[f"{_POOL}q.{kind}"] = rows[0].contiguous()
            result[f"{_POOL}kv.{kind}"] = torch.cat(rows[1:])
    return result


def _native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by OpenAI's names, whatever open_clip calls them; see `from_open_clip_name`."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith((f"{_POOL}q.", f"{_POOL}kv.")):
            continue
        positions = name == "visual.trunk.pos_embed"
        result[from_open_clip_name(name)] = value[0] if positions else value
    for kind in ("weight", "bias"):
        rows = [state[name] for part in ("q", "kv") if (name := f"{_POOL}{part}.{kind}") in state]
        if len(rows) == 2:
            result[f"{POOLING}attention.in_proj_{kind}"] = torch.cat(rows)
    return result


def _vision(shapes: CheckpointShapes) -> dict[str, Any]:
    width, _, _, patch_size = shapes[_PATCHES]
    positions = shapes["visual.positional_embedding"][0]
    patches = positions - ("visual.class_embedding" in shapes.state)
    return {
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": len(shapes.indices(r"visual\.transformer\.resblocks\.(\d+)\.")),
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
    }


def _text(shapes: CheckpointShapes) -> dict[str, Any]:
    words, width = shapes["token_embedding.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": len(shapes.indices(r"transformer\.resblocks\.(\d+)\.")),
        "max_position_embeddings": shapes["positional_embedding"][0],
        "vocab_size": words,
    }


def _name_in(state: Mapping[str, Tensor], form: Format) -> Callable[[str], str]:
    """Our name of a parameter to that in the file, for messages."""
    trunk = "visual.trunk.pos_embed" in state
    custom = form.custom_text or form.family == "siglip"

    def name_in(name: str) -> str:
        place = original_part(name)
        original = place.name if place else name
        return to_open_clip_name(original, trunk=trunk) if custom else original

    return name_in


def _inferred(
    path: Path, state: Mapping[str, Tensor], form: Format, options: Mapping[str, Any]
) -> CLIPConfig | SiglipConfig:
    """The configuration by shapes and by what is said of the file."""
    said = _open_clip_options(path.parent / OPEN_CLIP_CONFIG, form)
    chosen = {name: value for name, value in said.items() if value is not None}
    chosen |= options
    if "hidden_act" not in chosen:
        chosen["hidden_act"] = _activation(path, state, form)
    config = infer_config(state, **chosen)
    if form.custom_text:
        setattr(config, _CUSTOM_TEXT, True)  # is saved with the model, for `save_original`
    return config


def _siglip_heads(width: int, tower: str, given: int | None) -> int:
    wide = given is None and width in _SIGLIP_WIDTHS
    return attention_heads(width, tower, _SIGLIP_HEADS if wide else given)


def _class_of(config: CLIPConfig | SiglipConfig) -> Any:
    if isinstance(config, SiglipWithClipVisionConfig):
        return SiglipWithClipVision
    return SiglipModel if isinstance(config, SiglipConfig) else CLIPModel


def _open_clip_options(path: Path, form: Format) -> dict[str, Any]:
    """Activations, heads and epsilon that open_clip's configuration states, if there is one."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        _check_computed(path, vision, text, form)
        activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
        tower = str(vision.get("timm_model_name", ""))
        options: dict[str, Any] = {
            "hidden_act": _TANH if tower.startswith(_TANH_TOWERS) else activation,
            "text_act": _TANH if "approximate" in text.get("act_kwargs", {}) else activation,
            "text_eps": float(text.get("norm_kwargs", {}).get("eps", _TORCH_EPS)),
        }
        if "width" in vision:
            options["vision_heads"] = vision["width"] // vision.get("head_width", 64)
        if "heads" in text:
            options["text_heads"] = text["heads"]
        return options
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UnsupportedError(
            f"{path} is damaged or no configuration of open_clip: {first_line(error)}"
        ) from error


def _check_computed(
    path: Path, vision: Mapping[str, Any], text: Mapping[str, Any], form: Format
) -> None:
    """Raises for what no name or shape shows and the classes of transformers do not compute."""
    siglip = form.family == "siglip"
    computed = [
        ("text_cfg", text, "no_causal_mask", False, siglip),
        ("text_cfg", text, "pool_type", "argmax", "last" if siglip else "argmax"),
        ("vision_cfg", vision, "pool_type", "tok", "tok"),
        ("vision_cfg", vision, "act_kwargs", None, None),
        ("vision_cfg", vision, "norm_kwargs", None, None),
    ]
    for part, config, key, standard, needed in computed:
        if (found := config.get(key, standard)) != needed:
            raise UnsupportedError(
                f"{path}: {part} says {key} {reprlib.repr(found)}, which is not supported in a "
                f"{form.title} (only {needed!r})"
            )


def _activation(path: Path, state: Mapping[str, Tensor], form: Format) -> str:
    """That of OpenAI for its own files, and of open_clip for others, with a warning."""
    half = _PATCHES in state and state[_PATCHES].dtype == torch.float16
    if half or "quickgelu" in path.name.lower() or any(name in state for name in _OF_OPENAI):
        return "quick_gelu"
    other, keyword, value = (
        ("are of SigLIP 2, whose text tower has gelu_pytorch_tanh", "text_act", _TANH)
        if form.family == "siglip"
        else ("come from OpenAI, whose activation is quick_gelu", "hidden_act", "quick_gelu")
    )
    _log.warning(
        "%s does not say its activation; assumed is gelu, as in most models of open_clip. If the "
        'weights %s, the features are wrong: put a %s with {"%s": "%s"} next to the file, or call '
        'load_original(path, %s="%s")',
        path, other, path.with_suffix(".json").name, keyword, value, keyword, value,
    )  # fmt: skip
    return "gelu"
