"""Original BLIP checkpoints to ours and back."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from vlp_adapters.blip.configuration import BlipPretrainConfig
from vlp_adapters.blip.infer import infer_config
from vlp_adapters.blip.modeling import BlipForPretraining
from vlp_adapters.blip.names import from_original_name, to_original_name
from vlp_adapters.checkpoints import check_fit, read_state, write_state
from vlp_plugins.errors import UnsupportedError

_POSITIONS = ".embeddings.position_embeddings.weight"  # the original numbers each such table
_QUEUES = ("image_queue", "text_queue", "queue_ptr")


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an original checkpoint; computed buffers are left out."""
    named = ((from_original_name(original), tensor) for original, tensor in state.items())
    return {name: tensor for name, tensor in named if name is not None}


def state_to_original(model: BlipForPretraining) -> dict[str, Tensor]:
    """The state of `model` as the original code saves it, on the CPU.

    Shared tensors are there under every name; includes the `position_ids` that the original has.
    """
    result = {to_original_name(name): value.cpu() for name, value in model.state_dict().items()}
    for name in [name for name in result if name.endswith(_POSITIONS)]:
        ids = torch.arange(len(result[name])).expand(1, -1)
        result[name.replace(_POSITIONS, ".embeddings.position_ids")] = ids
    return result


def load_original(
    path: str | os.PathLike[str], config: BlipPretrainConfig | None = None
) -> BlipForPretraining:
    """Loads an original BLIP pre-training checkpoint, in evaluation mode.

    A checkpoint that was stripped of all momentum twins, or of the queues, is accepted: the twins
    start as copies of their networks, the queues at random.

    Args:
        path: `.pth` with `{"model": state_dict}`, a bare state_dict, or `.safetensors`.
        config: sizes; None to read them from the shapes (see `infer_config`).

    Raises:
        UnsupportedError: if the file cannot be read, or its tensors do not fit the model.
    """
    original = {name.removeprefix("module."): value for name, value in read_state(path).items()}
    model = BlipForPretraining(config or infer_config(original))
    expected = model.state_dict()
    state = state_from_original(original)
    _fill_ties(path, state, model.all_tied_weights_keys)
    if not any("_m." in name for name in state):
        twins = ((name, name.replace("_m.", ".", 1)) for name in expected if "_m." in name)
        state |= {twin: state[online] for twin, online in twins if online in state}
    if not any(name in state for name in _QUEUES):
        state |= {name: expected[name] for name in _QUEUES}
    check_fit(path, state, expected, "BLIP", to_original_name)
    model.load_state_dict(state)
    return model.eval()


def save_original(model: BlipForPretraining, path: str | os.PathLike[str]) -> None:
    """Writes `model` in the original format: `{"model": state_dict}`, or `.safetensors`."""
    write_state(state_to_original(model), path)


def _fill_ties(
    path: str | os.PathLike[str], state: dict[str, Tensor], ties: Mapping[str, str]
) -> None:
    """Adds the missing names of shared tensors in place; two values for one are an error."""
    for copy, source in ties.items():
        first, second = state.get(source), state.get(copy)
        if first is not None and second is not None and not torch.equal(first, second):
            raise UnsupportedError(
                f"{path}: {to_original_name(copy)} differs from {to_original_name(source)}, which "
                "are one parameter in BLIP pre-training; this is a checkpoint of another task, "
                "where the text towers were trained apart"
            )
        shared = first if first is not None else second
        if shared is not None:
            state[copy] = state[source] = shared
