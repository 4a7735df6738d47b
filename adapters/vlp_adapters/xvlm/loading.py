"""Finds out whether a file or folder holds an X-VLM pre-training model, and loads it then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vlp_plugins.errors import UnsupportedError

MODEL_TYPE = "vlp_xvlm_pretrain"
_PICKLED = frozenset({".pth", ".pt", ".bin", ".th"})
_HEADS = frozenset({"vision_proj.weight", "text_proj.weight", "itm_head.0.weight", "temp"})
_PATCHES = frozenset(  # original names: CLIP ViT, Swin
    {"vision_encoder.patch_embed.weight", "vision_encoder.patch_embed.proj.weight"}
)
_FIRST_LAYER = "text_encoder.bert.encoder.layer.0.attention.self.query.weight"


def load(source: str) -> nn.Module | None:
    """Loads what `save_pretrained` wrote or an original checkpoint file, in evaluation mode.

    Returns:
        The model; None if `source` is anything else, a hub id included. Finding that out is cheap
        and quiet.

    Raises:
        UnsupportedError: if it is X-VLM's, but damaged or incomplete.
    """
    path = Path(source)
    if is_pretrained_folder(path):
        return _from_folder(path)
    if not is_original_file(path):
        return None
    from vlp_adapters.xvlm.convert import load_original

    return load_original(path)


def is_pretrained_folder(path: Path) -> bool:
    """True for what `XvlmForPretraining.save_pretrained` wrote."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def is_original_file(path: Path) -> bool:
    """True for a checkpoint with the original's parameter names; tensors are not read."""
    if not path.is_file():
        return False
    names = {name.removeprefix("module.") for name in _tensor_names(path)}
    return names >= _HEADS and _FIRST_LAYER in names and not names.isdisjoint(_PATCHES)


def _tensor_names(path: Path) -> set[str]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        if path.suffix not in _PICKLED:
            return set()
        content = _open(path)
    # The unpickler fails in many ways on files that are not ours; whoever owns the file reports.
    except Exception:
        return set()
    state = content.get("model", content) if isinstance(content, Mapping) else None
    return set(map(str, state)) if isinstance(state, Mapping) else set()


def _open(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _from_folder(path: Path) -> nn.Module:
    from vlp_adapters.xvlm.modeling import XvlmForPretraining

    try:
        found: Any = XvlmForPretraining.from_pretrained(path, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"cannot load the X-VLM model in {path}: {reason}") from error
    model, report = found
    # transformers draws what a file lacks anew and only warns.
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedError(
            f"the X-VLM model in {path} lacks {len(missing)} parameter(s), first {missing[0]}; "
            "save it again with save_pretrained"
        )
    loaded: nn.Module = model.eval()
    return loaded
