"""Finds out whether a file or folder holds an X-VLM pre-training model, and loads it then."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vlp_adapters.checkpoints import from_folder, is_saved_as, tensor_names

MODEL_TYPE = "vlp_xvlm_pretrain"
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
    if is_saved_as(path, MODEL_TYPE):
        from vlp_adapters.xvlm.modeling import XvlmForPretraining

        return from_folder(XvlmForPretraining, path, "X-VLM")
    if not is_original_file(path):
        return None
    from vlp_adapters.xvlm.convert import load_original

    return load_original(path)


def is_original_file(path: Path) -> bool:
    """True for a checkpoint with the original's parameter names; tensors are not read."""
    names = tensor_names(path)
    return names >= _HEADS and _FIRST_LAYER in names and not names.isdisjoint(_PATCHES)
