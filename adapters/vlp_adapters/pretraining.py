"""What the pre-training models of the image-text families have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vlp_plugins.models.adapter import Negatives


@dataclass
class PretrainOutput(ModelOutput):
    """What a training step needs, and what its random choice was.

    Attributes:
        loss: sum of `losses`, a scalar.
        losses: the terms by name: `itc` contrastive, `itm` matching, and that of the words.
        negatives: the hard negatives of the matching loss (one image per text, one text per
            image); None without that loss.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    negatives: Negatives | None = None

    @classmethod
    def of(cls, terms: dict[str, Tensor], negatives: Negatives | None) -> PretrainOutput:
        """The output with these terms and negatives."""
        return cls(torch.stack([*terms.values()]).sum(), terms, negatives)


class DualEncoder(PreTrainedModel):
    """A vision and a text encoder whose first tokens are projected into one space.

    A subclass has `vision_proj` and `text_proj`, and defines `encode_image` and `encode_text`.
    In shapes, `B` pairs have `T` image tokens of width `Dv` and `L` text tokens of width `D`.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    vision_proj: nn.Linear
    text_proj: nn.Linear

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to tokens `[B, T, Dv]`, the global token first."""
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text alone: ids and mask `[B, L]` to `[B, L, D]`."""
        raise NotImplementedError

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """L2-normalised projection of the first token: `[B, T, Dv]` to `[B, embed_dim]`."""
        return functional.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """L2-normalised projection of the first token: `[B, L, D]` to `[B, embed_dim]`."""
        return functional.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to L2-normalised `[B, embed_dim]`."""
        return self.project_image(self.encode_image(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask `[B, L]` to L2-normalised `[B, embed_dim]`."""
        return self.project_text(self.encode_text(input_ids, attention_mask))


def check_losses(chosen: Collection[str], known: Sequence[str]) -> None:
    """Checks the names of the losses to compute.

    Raises:
        ValueError: if there is none, or an unknown one.
    """
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        raise ValueError(
            f"losses={tuple(chosen)!r}{f' has unknown {unknown}' if unknown else ''}: choose "
            f"one or more of {', '.join(known)}"
        )
