"""Original X-VLM checkpoints to ours and back."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from vlp_adapters.checkpoints import check_fit, read_state, write_state
from vlp_adapters.xvlm.configuration import XvlmPretrainConfig
from vlp_adapters.xvlm.infer import infer_config
from vlp_adapters.xvlm.modeling import XvlmForPretraining
from vlp_adapters.xvlm.names import from_original_name, to_original_name
from vlp_adapters.xvlm.swin import fuse_qkv, split_qkv
from vlp_plugins.errors import UnsupportedError

_DECODER = "text_encoder.cls.predictions.decoder.weight"
_WORDS = "text_encoder.bert.embeddings.word_embeddings.weight"
_POSITIONS = {  # buffers of the original by the table that they number
    "vision_encoder.pos_embed.weight": "vision_encoder.position_ids",
    "text_encoder.bert.embeddings.position_embeddings.weight": (
        "text_encoder.bert.embeddings.position_ids"
    ),
}


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an original checkpoint; computed buffers are left out."""
    result: dict[str, Tensor] = {}
    for original, tensor in split_qkv(state).items():
        name = from_original_name(original)
        if name is not None:
            result[name] = tensor
    return result


def state_to_original(model: XvlmForPretraining) -> dict[str, Tensor]:
    """The state of `model` as the original code saves it, on the CPU.

    Includes the `position_ids` that the original expects. Swin's computed buffers are left out:
    the original code drops them when it loads.
    """
    state = {to_original_name(name): value.cpu() for name, value in model.state_dict().items()}
    result = fuse_qkv(state)
    for table, buffer in _POSITIONS.items():
        if table in result:
            result[buffer] = torch.arange(len(result[table])).expand(1, -1)
    return result


def load_original(
    path: str | os.PathLike[str], config: XvlmPretrainConfig | None = None
) -> XvlmForPretraining:
    """Loads an original X-VLM pre-training checkpoint, in evaluation mode.

    Args:
        path: `.pth` with `{"model": state_dict}`, a bare state_dict, or `.safetensors`.
        config: sizes; None to read them from the shapes (see `infer_config`).

    Raises:
        UnsupportedError: if the file cannot be read, or its tensors do not fit the model.
    """
    original = {name.removeprefix("module."): value for name, value in read_state(path).items()}
    model = XvlmForPretraining(config or infer_config(original))
    state = state_from_original(original)
    state.setdefault(_DECODER, state.get(_WORDS, torch.empty(0)))  # tied: saved once or twice
    expected = model.state_dict()
    check_fit(path, state, expected, "X-VLM", to_original_name)
    if not torch.equal(state[_DECODER], state[_WORDS]):
        raise UnsupportedError(
            f"{path}: the MLM decoder differs from the word embeddings, which X-VLM ties"
        )
    model.load_state_dict(state)
    return model.eval()


def save_original(model: XvlmForPretraining, path: str | os.PathLike[str]) -> None:
    """Writes `model` in the original format: `{"model": state_dict}`, or `.safetensors`."""
    write_state(state_to_original(model), path)
