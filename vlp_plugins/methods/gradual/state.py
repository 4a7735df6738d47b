"""The state of rising masks as tensors alone: for a checkpoint, and back.

Whatever is no tensor is JSON in a uint8 tensor, so that `torch.save`, `torch.load(weights_only=
True)` and safetensors all keep it, and reading it executes nothing: in a training of the user's own
it goes into the user's own checkpoint (`GradualPruning.state_dict`), not into one of ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from vlp_plugins.masks.packed import flaw, pack, unpack
from vlp_plugins.methods.gradual.rising_masks import RisingMasks
from vlp_plugins.runtime.errors import MaskError, first_line, shown
from vlp_plugins.runtime.untrusted import read_as

_ABOUT, _KEEP, _SUM, _STATE = "about", "keep", "sum", "state"
_SCHEMA = 1
_REMEDY = "give the state of this run, or start it anew"


def dump(rising: RisingMasks, dense: str | None = None) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on.

    Args:
        rising: as they are; the tensors of its score are handed out themselves, not copied.
        dense: hash of the weights before all steps.

    Returns:
        Tensors by name, all on the devices where they are.
    """
    about = {
        "schema": _SCHEMA,
        "step": rising.step,
        "samples": rising.samples,
        "dense": dense,
        "identity": _identity(rising),
    }
    tensors = {_ABOUT: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}
    for name, mask in rising.keep.items():
        tensors[f"{_KEEP}|{name}"] = pack(mask)
    for name, values in rising.sums.items():
        tensors[f"{_SUM}|{name}"] = values
    for name, state in rising.state.items():
        tensors |= {f"{_STATE}|{key}|{name}": values for key, values in state.items()}
    return tensors


def restore(rising: RisingMasks, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Inverse of `dump`, into masks of the same weights and rise.

    Returns:
        The hash of the weights before all steps, if it was known.

    Raises:
        MaskError: if that is the state of something else, or damaged; nothing is changed then.
    """
    about = _about(tensors)
    mine = json.loads(json.dumps(_identity(rising)))
    for key, theirs in about["identity"].items():
        if theirs != mine.get(key):
            raise MaskError(
                f"the state is of another run: its {key:.80} is {shown(theirs)}, this one's is "
                f"{shown(mine.get(key))}; {_REMEDY}"
            )
    keep, sums = {}, {}
    state: dict[str, dict[str, torch.Tensor]] = {}
    for full, values in tensors.items():
        kind, _, name = full.partition("|")
        if kind == _KEEP:
            keep[name] = _bits(rising, name, values)
        elif kind == _SUM:
            sums[name] = _numbers(rising, name, values)
        elif kind == _STATE:
            key, _, name = name.partition("|")
            state.setdefault(name, {})[key] = _numbers(rising, name, values)
    for name in rising.weights:
        if (keep and name not in keep) or (state and name not in state):
            raise MaskError(f"the state lacks weight {name!r}; it is damaged: {_REMEDY}")
    rising.step, rising.samples = about["step"], about["samples"]
    rising.keep = {name: keep[name] for name in rising.weights if keep}
    rising.sums, rising.state = sums, state
    return about["dense"]


def _identity(rising: RisingMasks) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes."""
    return {
        "score": rising.rise.name,
        "target": rising.rise.target,
        **rising.rise.record(),
        "adapter": rising.weights.adapter_name,
        "structure": rising.weights.structure,
    }


def _about(tensors: Mapping[str, torch.Tensor]) -> _About:
    if _ABOUT not in tensors:
        raise MaskError(f"that is no state of gradual pruning (it has no {_ABOUT!r}); {_REMEDY}")
    try:
        about = read_as(_About, json.loads(bytes(tensors[_ABOUT].cpu().numpy())), "the state")
    except (ValueError, TypeError, RecursionError) as error:
        raise MaskError(
            f"the state is damaged ({type(error).__name__}: {first_line(error)}); {_REMEDY}"
        ) from error
    if about["schema"] > _SCHEMA:
        raise MaskError(
            f"the state has format {about['schema']}, newer than the {_SCHEMA} that this "
            "version reads: upgrade vlp-plugins"
        )
    return about


class _About(TypedDict):
    """What is no tensor; see `dump`."""

    schema: int
    step: int
    samples: int
    dense: str | None
    identity: dict[str, Any]


def _bits(rising: RisingMasks, name: str, bits: torch.Tensor) -> torch.Tensor:
    weight = _weight(rising, name)
    if found := flaw(bits, weight.shape):
        raise MaskError(f"the mask of {name!r} in the state {found}; it is damaged: {_REMEDY}")
    return unpack(bits.cpu(), weight.shape).to(weight.parameter.device)


def _numbers(rising: RisingMasks, name: str, values: torch.Tensor) -> torch.Tensor:
    weight = _weight(rising, name)
    if values.dtype != torch.float32 or values.numel() != weight.numel:
        raise MaskError(
            f"the state of {name!r} is {values.dtype} [{values.numel()}] instead of torch.float32 "
            f"[{weight.numel}]; it is damaged: {_REMEDY}"
        )
    # A copy: the next steps change it in place, and the caller may load it again.
    return values.detach().to(weight.parameter.device, copy=True).flatten()


def _weight(rising: RisingMasks, name: str) -> Any:
    if name not in rising.weights:
        raise MaskError(f"the state has weight {name!r}, which the model lacks; {_REMEDY}")
    return rising.weights[name]
