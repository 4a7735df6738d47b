"""Names of other code for ViT and DINO: transformers 4, and timm, which DINO's code follows."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlp_adapters.checkpoints import check_fit, joined, options_of, read_state, write_state
from vlp_adapters.names import rebegin, reverse
from vlp_adapters.shapes import CheckpointShapes, check_options, shapes_of
from vlp_plugins.models.adapter import OriginalPart
from vlp_plugins.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

_log = logging.getLogger(__name__)

# Path of a layer in transformers 5: ViT's `layers.3.`, DINOv2's `encoder.layer.3.`, DINOv3's
# `model.layer.3.`.
LAYER = re.compile(
    r"((?:vit\.|dinov2\.|dinov2_with_registers\.)?)"
    r"(layers|encoder\.layer|model\.layer)\.(\d+)\.(\w+\.\w+)(.*)"
)
_ORIGINAL_ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_ORIGINAL_VIT = {
    **_ORIGINAL_ATTENTION,
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ORIGINAL_DINOV2 = {
    **_ORIGINAL_ATTENTION,
    "mlp.gate_proj": None,  # the original has gate and up in one tensor
    "mlp.up_proj": None,
    "mlp.down_proj": "mlp.weights_out",
}
_HALF = re.compile(r"(encoder\.layer\.\d+\.mlp\.)(gate|up)_proj\.")


def to_original_name(path: str) -> str | None:
    """The name of a parameter until transformers 4.

    None for the halves of a SwiGLU, which were one tensor then.
    """
    match = LAYER.fullmatch(path)
    if match is None:
        return path
    root, container, index, layer, rest = match.groups()
    if container == "model.layer":
        return f"layer.{index}.{layer}{rest}"
    names = _ORIGINAL_VIT if container == "layers" else _ORIGINAL_DINOV2
    original = names.get(layer, layer)
    return None if original is None else f"{root}encoder.layer.{index}.{original}{rest}"


def original_part(path: str) -> OriginalPart | None:
    """Where the original keeps a parameter: the halves of a SwiGLU are one tensor there."""
    if match := _HALF.search(path):
        name = to_original_name(path.replace(match[0], f"{match[1]}weights_in."))
        return OriginalPart(str(name), ("gate", "up").index(match[2]), 2)
    name = to_original_name(path)
    return None if name is None else OriginalPart(name)


# Beginnings of names, (ours, timm's).
_TIMM = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)
_TIMM_LAYER = (
    ("attention.o_proj.", "attn.proj."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
)
_OUR_LAYER = re.compile(r"(?:vit\.)?layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_FUSED = ("q_proj", "k_proj", "v_proj")
_SIGNS = frozenset({"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"})
_BACKBONE = "backbone."  # of a student or teacher of DINO, next to its head
_OPTIONS = ("hidden_act", "layer_norm_eps", "vision_heads")


@dataclass(frozen=True)
class TimmFormat:
    """What a checkpoint of timm or of DINO's code is.

    Attributes:
        title: what users call it.
        supported: whether it can be loaded.
    """

    title: str
    supported: bool = True


def timm_format(names: Set[str]) -> TimmFormat | None:
    """The format of a checkpoint of timm or of DINO's code; None for any other."""
    if names >= {_BACKBONE + sign for sign in _SIGNS}:
        return TimmFormat("DINO training file (its teacher is used, without projection head)")
    if not names >= _SIGNS:
        return None
    if any(name.endswith(".ls1.gamma") for name in names):
        return TimmFormat("DINOv2 checkpoint, or another ViT of timm with layer scale", False)
    if "cls_token" not in names:
        return TimmFormat("ViT checkpoint of timm without a class token", False)
    if "head.weight" in names:
        return TimmFormat("ViT checkpoint of timm with a classifier")
    return TimmFormat("ViT checkpoint of DINO or timm without a classifier")


def load_original(
    path: str | os.PathLike[str], config: ViTConfig | None = None, **options: Any
) -> ViTModel | ViTForImageClassification:
    """Loads a ViT with the names of timm, which the code of DINO shares, in evaluation mode.

    A file with a classifier (`head.weight`) becomes a `ViTForImageClassification`, any other a
    `ViTModel` without pooler. Of a training file of DINO it is the backbone of the teacher, as in
    the evaluation of the original; its projection head is left out.

    Args:
        path: `.pth` or `.safetensors` with the state_dict, bare or in a training file.
        config: sizes; None reads them from the shapes.
        **options: what shapes do not tell; also read from a `.json` file with the name of the
            checkpoint: `vision_heads` (width / 64 otherwise), `hidden_act` (`gelu`) and
            `layer_norm_eps` (1e-6).

    Raises:
        UnsupportedError: if the file cannot be read, or its tensors do not fit.
    """
    from transformers import ViTForImageClassification, ViTModel
    from transformers.initialization import no_init_weights

    original = read_state(path)
    form = timm_format(original.keys())
    if form is None:
        raise UnsupportedError(f"{path} is no ViT checkpoint with the names of timm or DINO")
    if not form.supported:
        raise UnsupportedError(
            f"{path} is a {form.title}, which is not supported; give the folder of this model that "
            "transformers loads, with config.json"
        )
    original = _backbone(path, original)
    said = options_of(path, _OPTIONS, options, config)
    with shapes_of(path, "ViT"):
        if config is None:
            config = infer_config(original, **said)
        model: ViTModel | ViTForImageClassification
        with no_init_weights():  # all are loaded
            if "head.weight" in original:
                model = ViTForImageClassification(config)
            else:
                model = ViTModel(config, add_pooling_layer=False)
        state = state_from_original(original)
        check_fit(path, state, model.state_dict(), "ViT", _timm_name)
        model.load_state_dict(state)
    return model.eval()


def save_original(
    model: ViTModel | ViTForImageClassification, path: str | os.PathLike[str]
) -> None:
    """Writes a bare state_dict with the names of timm, which the loaders of timm and DINO read.

    Args:
        model: as `load_original` returns it.
        path: `.safetensors`, or any other ending for a PyTorch file.

    Raises:
        UnsupportedError: if the model has parameters that timm's has not.
    """
    write_state(state_to_original(model), path, key=None)


def infer_config(
    state: Mapping[str, Tensor],
    *,
    hidden_act: str = "gelu",
    layer_norm_eps: float = 1e-6,
    vision_heads: int | None = None,
) -> ViTConfig:
    """Reads sizes from tensors with the names of timm.

    Args:
        state: tensors by original name.
        hidden_act: gelu in timm and DINO.
        layer_norm_eps: 1e-6 in timm and DINO.
        vision_heads: heads per layer; None for width / 64.

    Raises:
        UnsupportedError: if it is no ViT with a class token, or the heads cannot be guessed.
    """
    from transformers import ViTConfig

    shapes = CheckpointShapes(state, "ViT")
    labels = {"num_labels": len(state["head.weight"])} if "head.weight" in state else {}
    options = {"hidden_act": hidden_act, "layer_norm_eps": layer_norm_eps}
    check_options(options, {})
    return ViTConfig(
        **shapes.vision_transformer("", vision_heads),
        num_channels=shapes["patch_embed.proj.weight"][1],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        **options,
        **labels,
    )


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, of a model with a classifier if there is a head; qkv is split."""
    prefix = "vit." if "head.weight" in state else ""
    result: dict[str, Tensor] = {}
    for original, value in state.items():
        match = _BLOCK.fullmatch(original)
        if match is None:
            name = rebegin(original, reverse(_TIMM))
            result[name if name.startswith("classifier.") else prefix + name] = value
            continue
        layer = f"{prefix}layers.{match[1]}."
        _, fused, kind = match[2].rpartition("attn.qkv.")
        if fused:
            rows = value.chunk(len(_FUSED))
            result |= {f"{layer}attention.{p}.{kind}": r for p, r in zip(_FUSED, rows, strict=True)}
        else:
            result[layer + rebegin(match[2], reverse(_TIMM_LAYER))] = value
    return result


def state_to_original(model: ViTModel | ViTForImageClassification) -> dict[str, Tensor]:
    """The state of `model` with the names of timm, on the CPU.

    Raises:
        UnsupportedError: if the model has parameters that timm's has not.
    """

    def place_of(name: str) -> OriginalPart:
        if place := timm_part(name):
            return place
        raise UnsupportedError(
            f"{type(model).__name__} has {name}, for which timm has no name; give a ViTModel "
            "without pooler or a ViTForImageClassification"
        )

    return joined(model.state_dict(), place_of)


def timm_part(path: str) -> OriginalPart | None:
    """Where timm keeps a parameter of ViT: a third of `attn.qkv` for query, key and value.

    None for what timm does not have.
    """
    match = _OUR_LAYER.fullmatch(path)
    if match is None:
        path = path.removeprefix("vit.")
        name = rebegin(path, _TIMM)
        return None if name == path else OriginalPart(name)
    block, tail = f"blocks.{match[1]}.", match[2]
    for part, projection in enumerate(_FUSED):
        if tail.startswith(f"attention.{projection}."):
            kind = tail.rpartition(".")[2]
            return OriginalPart(f"{block}attn.qkv.{kind}", part, len(_FUSED))
    return OriginalPart(block + rebegin(tail, _TIMM_LAYER))


def _timm_name(path: str) -> str:
    place = timm_part(path)
    return place.name if place else path.removeprefix("vit.")


def _backbone(path: str | os.PathLike[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state itself, or that of the backbone of a network of DINO."""
    inner = {n.removeprefix(_BACKBONE): v for n, v in state.items() if n.startswith(_BACKBONE)}
    if inner:
        _log.info(
            "%s: the teacher is loaded; %d tensors of its projection head are left out, which "
            "ViTModel has no place for",
            path, len(state) - len(inner),
        )  # fmt: skip
    return inner or state
