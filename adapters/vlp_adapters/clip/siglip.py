"""SigLIP and SigLIP 2 as pruning sees them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vlp_adapters.clip.inputs import TowerInputs, padded_texts
from vlp_adapters.clip.two_towers import TwoTowerAdapter, states_of
from vlp_adapters.clip.weights import SIGLIP_EXCLUSIONS
from vlp_adapters.kinds import Classes, Kind
from vlp_adapters.objectives import similarity
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import UnsupportedError

_TEXT_LENGTH = 64  # tokens of every text in pre-training, of both generations
_CLASSES: Classes = {
    f"transformers.models.{module}.modeling_{module}.{family}{name}": kind
    for module, family in (("siglip", "Siglip"), ("siglip2", "Siglip2"))
    for name, kind in (
        ("Model", Kind.DUAL),
        ("VisionModel", Kind.VISION),
        ("TextModel", Kind.TEXT),
        ("ForImageClassification", Kind.CLASSIFIER),
    )
}


class SiglipAdapter(TwoTowerAdapter):
    """`SiglipModel`, `Siglip2Model`, their towers and image classifiers.

    Canonical names are those of CLIP. The models were trained on texts padded to 64 tokens, whose
    padding takes part in the attention: every text token is real; see `padded_texts`.
    """

    name = "siglip"
    title = "SigLIP"
    classes = _CLASSES
    excluded = SIGLIP_EXCLUSIONS
    saved: ClassVar = {"vlp_siglip_clip_vision": "clip.modeling.SiglipWithClipVision"}

    def texts_of(self, tower: Any, batch: Batch) -> TowerInputs:
        """Ids, and the mask if there is one; see `padded_texts`."""
        return padded_texts(tower, batch)

    def text_options(self, tokenizer: Any) -> dict[str, Any]:
        """To the full length without a mask, as in pre-training, whatever the tokenizer says."""
        return {
            "padding": "max_length",
            "max_length": min(_TEXT_LENGTH, int(tokenizer.model_max_length)),
            "return_attention_mask": False,
        }

    def embed(self, model: Any, modality: str, inputs: TowerInputs) -> Tensor:
        """What the tower's head returns, L2-normalised `[B, D]`."""
        pooled = states_of(model, modality, inputs).pooler_output
        if pooled is None:
            raise UnsupportedError(
                f"{type(model).__name__} was made with vision_use_head=False, so it has no features"
            )
        return functional.normalize(pooled, dim=-1)

    def contrast(self, model: Any, images: Tensor, texts: Tensor) -> Tensor:
        """Sigmoid loss of all `B * B` pairs, their sum over `B` (Zhai et al. 2023, equation 1)."""
        temperature = (-model.logit_scale.float()).exp()
        logits = similarity(images, texts.T, temperature)
        logits = logits + model.logit_bias.to(logits.dtype)
        signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
        return -functional.logsigmoid(signs * logits).sum() / len(logits)
