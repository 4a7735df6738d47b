"""The names of ViT and DINOv2 until transformers 4, which published code and checkpoints use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlp_adapters.checkpoints import few
from vlp_plugins.models.adapter import OriginalPart
from vlp_plugins.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def from_original(state: Mapping[str, Tensor], config: PreTrainedConfig) -> nn.Module:
    """The model of a state dict that has the names until transformers 4, in evaluation mode.

    Args:
        state: tensors of a `ViTModel`, `Dinov2Model` or of their image classifiers (`vit.` or
            `dinov2.` in front).
        config: `ViTConfig` or `Dinov2Config` with its sizes.

    Raises:
        UnsupportedError: if tensors are missing, left over or of another shape.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    is_classifier = any(name.startswith(f"{config.model_type}.") for name in state)
    family = AutoModelForImageClassification if is_classifier else AutoModel
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, then overwritten
        model: nn.Module = family.from_config(config, trust_remote_code=False)
    if not is_classifier and "pooler.dense.weight" not in state and hasattr(model, "pooler"):
        model.register_module("pooler", None)
    expected = model.state_dict()
    names = {path: to_original_name(path) for path in expected}
    missing = [str(name or path) for path, name in names.items() if name not in state]
    extra = sorted(set(state) - {name for name in names.values() if name})
    if missing or extra:
        raise UnsupportedError(
            f"the state dict is not of this {type(model).__name__}: "
            f"missing {few(missing) or 'none'}, unknown {few(extra) or 'none'}; try the model's "
            "from_pretrained"
        )
    found = {path: state[name] for path, name in names.items() if name}
    for path, tensor in found.items():
        if tensor.shape != expected[path].shape:
            raise UnsupportedError(
                f"{names[path]} is {list(tensor.shape)}, the configuration asks for "
                f"{list(expected[path].shape)}"
            )
    model.load_state_dict(found)
    return model.eval()
