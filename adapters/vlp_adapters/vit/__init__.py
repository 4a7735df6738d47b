"""ViT, DINO and DINOv2 of transformers."""

from vlp_adapters.vit.adapter import ViTAdapter
from vlp_adapters.vit.original import load_original, save_original

__all__ = ["ViTAdapter", "load_original", "save_original"]
