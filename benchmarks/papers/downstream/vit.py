"""The small ViT: its sizes, its image processor, its objective.

Pre-training needs no labels: from the state of the class token the scan that an image was made
from is to be recovered, upright and without its ground, and the colour of its ink. It is the
objective of a denoising autoencoder (Vincent et al. 2008) with distortion in the place of noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from benchmarks.papers.downstream.classes import SIDE

MODEL = Path(__file__).parent / "models" / "vit"
PATCH = 8
POSITION_STD = 0.3  # with transformers' 0.02 a tower takes long to find out where things are
MEAN, STD = 0.3, 0.25  # of the pixels, rounded
SCAN = 8  # pixels, side of a scan


def build_vit() -> ViTModel:
    """A new tower: 6 layers, 128 wide, 17 tokens; weights from torch's global generator."""
    model = ViTModel(
        ViTConfig(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    nn.init.normal_(model.embeddings.position_embeddings, std=POSITION_STD)
    return model


def build_image_processor() -> ViTImageProcessorPil:
    """Resizes to 32x32 and normalises."""
    return ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


def normalise(images: Tensor) -> Tensor:
    """What the image processor does to a 32x32 image: uint8 `[n, 3, 32, 32]` to float32."""
    return (images.to(torch.float32) / 255 - MEAN) / STD


def features(model: ViTModel, images: Tensor) -> Tensor:
    """The class token's states: uint8 `[n, 3, 32, 32]` to `[n, 128]`."""
    states: Tensor = model(pixel_values=normalise(images)).last_hidden_state
    return states[:, 0]


def recovery() -> nn.Linear:
    """What reads scan and colour off the features; thrown away afterwards."""
    return nn.Linear(128, SCAN * SCAN + 3)


def recovery_loss(found: Tensor, scans: Tensor, colours: Tensor) -> Tensor:
    """Mean squared error of scans and of colours, added.

    Args:
        found: `[n, 67]`, pixels of the scan row by row, then red, green, blue.
        scans: `[n, 8, 8]`.
        colours: `[n, 3]`.
    """
    pixels, ink = found.float().split([SCAN * SCAN, 3], dim=1)
    return F.mse_loss(pixels, scans.flatten(1)) + F.mse_loss(ink, colours)


@torch.inference_mode()
def nearest_labels(model: ViTModel, known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """The label of the nearest known image by cosine, for every image asked about.

    Args:
        model: in evaluation mode.
        known: uint8 `[n, 3, 32, 32]`.
        labels: int64 `[n]`, theirs.
        asked: uint8 `[m, 3, 32, 32]`.

    Returns:
        int64 `[m]`.
    """
    there, here = (F.normalize(features(model, images), dim=1) for images in (known, asked))
    return labels[(here @ there.T).argmax(dim=1)]
