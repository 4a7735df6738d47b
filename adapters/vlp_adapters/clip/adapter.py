"""CLIP as pruning sees it: transformers' classes, and checkpoints of OpenAI's and open_clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from vlp_adapters.clip.inputs import TowerInputs, ended_texts
from vlp_adapters.clip.names import original_part, to_original_name
from vlp_adapters.clip.two_towers import TwoTowerAdapter, states_of
from vlp_adapters.clip.weights import CLIP_EXCLUSIONS, VISION
from vlp_adapters.kinds import Classes, Kind
from vlp_adapters.objectives import batch_contrastive_loss, similarity
from vlp_plugins.models.adapter import Batch, OriginalPart
from vlp_plugins.runtime.errors import UnsupportedError

_CLIP = "transformers.models.clip.modeling_clip"
_CLASSES: Classes = {
    f"{_CLIP}.CLIPModel": Kind.DUAL,
    f"{_CLIP}.CLIPVisionModel": Kind.VISION,
    f"{_CLIP}.CLIPVisionModelWithProjection": Kind.VISION,
    f"{_CLIP}.CLIPTextModel": Kind.TEXT,
    f"{_CLIP}.CLIPTextModelWithProjection": Kind.TEXT,
    f"{_CLIP}.CLIPForImageClassification": Kind.CLASSIFIER,
}


class ClipAdapter(TwoTowerAdapter):
    """`CLIPModel`, its towers with and without projection, and `CLIPForImageClassification`.

    Canonical names are `vision.{i}.attention.query`, `vision.{i}.mlp.fc1`, `text.{i}.self.query`,
    `text.{i}.ffn.fc1`. Text attention is causal, and all after a text's end token is padding.
    """

    name = "clip"
    title = "CLIP"
    classes = _CLASSES
    excluded = CLIP_EXCLUSIONS

    def texts_of(self, tower: Any, batch: Batch) -> TowerInputs:
        """Ids and mask; see `ended_texts`."""
        return ended_texts(tower, batch)

    def text_options(self, tokenizer: Any) -> dict[str, Any]:
        """To the longest caption of the batch."""
        return {"padding": True}

    def embed(self, model: Any, modality: str, inputs: TowerInputs) -> Tensor:
        """The pooled state, projected; L2-normalised `[B, D]`."""
        name = "visual_projection" if modality == VISION else "text_projection"
        projection = getattr(model, name, None)
        if projection is None:
            raise UnsupportedError(
                f"{type(model).__name__} has no {name} into the common space of images and texts; "
                "load CLIPModel, or the tower's class ...WithProjection"
            )
        return functional.normalize(
            projection(states_of(model, modality, inputs).pooler_output), dim=-1
        )

    def contrast(self, model: Any, images: Tensor, texts: Tensor) -> Tensor:
        """Symmetric cross-entropy (Radford et al. 2021, figure 3) at the learned temperature."""
        temperature = (-model.logit_scale.float()).exp()
        return batch_contrastive_loss(similarity(images, texts.T, temperature))

    def original_name(self, path: str) -> str | None:
        """OpenAI's name of parameter `path`; see `to_original_name`."""
        return to_original_name(path)

    def original_part(self, path: str) -> OriginalPart | None:
        """See `names.original_part`."""
        return original_part(path)
