"""Original X-VLM checkpoints to ours and back."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the tensors of a `.safetensors` or PyTorch file; code in a file is never run.

    A PyTorch file may hold the state itself or have it under the key `model`.

    Raises:
        UnsupportedError: if the file is missing, damaged, or holds anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UnsupportedError(f"{path} is not a file; give an X-VLM checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedError(
            f"{path} was not read: it holds objects other than tensors, which could run code, or "
            "it is no PyTorch file; save the bare state_dict and try again"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UnsupportedError(f"{path} is damaged or no checkpoint: {error}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UnsupportedError(f"{path} holds no state_dict, neither bare nor under 'model'")
    wrong = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise UnsupportedError(f"{path} holds no state_dict: {_few(wrong)} is not a tensor")
    return dict(state)


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
    _refuse(path, "lacks", expected.keys() - state.keys())
    _refuse(path, "has, unknown to the pre-training model,", state.keys() - expected.keys())
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UnsupportedError(
                f"{path}: {name} is {list(tensor.shape)}, the configuration asks for "
                f"{list(expected[name].shape)}; give the configuration of this checkpoint"
            )
    if not torch.equal(state[_DECODER], state[_WORDS]):
        raise UnsupportedError(
            f"{path}: the MLM decoder differs from the word embeddings, which X-VLM ties"
        )
    model.load_state_dict(state)
    return model.eval()


def save_original(model: XvlmForPretraining, path: str | os.PathLike[str]) -> None:
    """Writes `model` in the original format: `{"model": state_dict}`, or `.safetensors`."""
    path = Path(path)
    # A clone: tied tensors share memory, which safetensors refuses and the original does not need.
    state = {name: tensor.clone() for name, tensor in state_to_original(model).items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path)


def _refuse(path: str | os.PathLike[str], verb: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        raise UnsupportedError(
            f"{path} {verb} {len(names)} parameter(s) ({_few(names)}); it is not a checkpoint of"
            " this X-VLM pre-training model"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
