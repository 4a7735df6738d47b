"""Finds out whether a file or folder holds a BLIP pre-training model, and loads it then."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vlp_adapters.checkpoints import from_folder, is_saved_as, tensor_names

MODEL_TYPE = "vlp_blip_pretrain"
_PATCHES = "visual_encoder.patch_embed.proj.weight"
_FIRST_LAYER = "encoder.layer.0.crossattention.self.query.weight"
_TEXT = (f"text_encoder.{_FIRST_LAYER}", f"text_decoder.bert.{_FIRST_LAYER}")


def load(source: str) -> nn.Module | None:
    """Loads what `save_pretrained` wrote or an original checkpoint file, in evaluation mode.

    Returns:
        The model; None if `source` is anything else, a hub id or a folder of transformers' own
        classes included. Finding that out is cheap and quiet.

    Raises:
        UnsupportedError: if it is BLIP's, but damaged, incomplete or of another task.
    """
    path = Path(source)
    if is_saved_as(path, MODEL_TYPE):
        from vlp_adapters.blip.modeling import BlipForPretraining

        return from_folder(BlipForPretraining, path, "BLIP")
    if not is_original_file(path):
        return None
    from vlp_adapters.blip.convert import load_original

    return load_original(path)


def is_original_file(path: Path) -> bool:
    """True for a checkpoint with the original's parameter names, of any task."""
    names = tensor_names(path)
    return _PATCHES in names and not names.isdisjoint(_TEXT)
