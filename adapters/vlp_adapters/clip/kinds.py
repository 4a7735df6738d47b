"""Which of the CLIP and SigLIP classes a model is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from torch import nn


class Kind(StrEnum):
    """What a class has of the two towers; the value of a single tower is its modality."""

    DUAL = "dual encoder"
    VISION = "vision"
    TEXT = "text"
    CLASSIFIER = "classification"  # the vision tower and a head for classes


Classes = Mapping[str, Kind]
"""Full names of classes, compared as text: asking about another model imports no transformers."""

_CLIP = "transformers.models.clip.modeling_clip"
CLIP_CLASSES: Classes = {
    f"{_CLIP}.CLIPModel": Kind.DUAL,
    f"{_CLIP}.CLIPVisionModel": Kind.VISION,
    f"{_CLIP}.CLIPVisionModelWithProjection": Kind.VISION,
    f"{_CLIP}.CLIPTextModel": Kind.TEXT,
    f"{_CLIP}.CLIPTextModelWithProjection": Kind.TEXT,
    f"{_CLIP}.CLIPForImageClassification": Kind.CLASSIFIER,
}
SIGLIP_CLASSES: Classes = {
    f"transformers.models.{module}.modeling_{module}.{family}{name}": kind
    for module, family in (("siglip", "Siglip"), ("siglip2", "Siglip2"))
    for name, kind in (
        ("Model", Kind.DUAL),
        ("VisionModel", Kind.VISION),
        ("TextModel", Kind.TEXT),
        ("ForImageClassification", Kind.CLASSIFIER),
    )
}


def kind_among(classes: Classes, model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is none of `classes`."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((classes[name] for name in names if name in classes), None)
