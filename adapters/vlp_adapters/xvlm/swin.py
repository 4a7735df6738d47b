"""The original Swin encoder keeps query, key and value in one matrix; transformers keeps three."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces every `attn.qkv.*` (first dimension `3 D`) by `attn.{q,k,v}_proj.*` (`D` each)."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            result[name] = tensor
            continue
        for projection, rows in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
            result[name.replace(".qkv.", f".{projection}.")] = rows.clone()
    return result


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `split_qkv`."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}.")] for part in _PROJECTIONS]
            result[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            result[name] = tensor
    return result
