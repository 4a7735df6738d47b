"""The prunable weights of CLIP and SigLIP: names, exclusions, and where they go downstream."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from vlp_adapters.kinds import Kind, check_linear
from vlp_adapters.names import CLIP_PARTS
from vlp_plugins.models.adapter import Exclusion, Owner, WeightSpec
from vlp_plugins.runtime.errors import UnsupportedError

VISION, TEXT = "vision", "text"

# A class that is one tower has no `vision_model.` or `text_model.` in front.
_LAYER = re.compile(r"(?:(vision|text)_model\.)?encoder\.layers\.(\d+)\.(\w+\.\w+)")
_PARTS = {  # as the other families call them: ViT's parts, BERT's parts
    VISION: CLIP_PARTS,
    TEXT: {
        "self_attn.q_proj": "self.query",
        "self_attn.k_proj": "self.key",
        "self_attn.v_proj": "self.value",
        "self_attn.out_proj": "self.output",
        "mlp.fc1": "ffn.fc1",
        "mlp.fc2": "ffn.fc2",
    },
}

_COMMON = (
    Exclusion(r"^classifier\.", "classifier: belongs to the task, not to the tower"),
    Exclusion(r"(^|\.)embeddings\.", "embeddings: words, patches, positions, class token"),
    Exclusion(r"(^|\.)\w*(layer_norm|layrnorm|layernorm)\d?\.", "normalisation"),
    Exclusion(r"\.bias$", "bias"),
    Exclusion(r"^logit_scale$", "temperature of the contrastive loss"),
)
CLIP_EXCLUSIONS = (
    Exclusion(r"^(visual|text)_projection\.", "projection into the common space"),
    *_COMMON,
)
SIGLIP_EXCLUSIONS = (
    Exclusion(r"(^|\.)head\.(weight|bias)$", "projection into the common space"),
    # Its attention is an `nn.MultiheadAttention`, which calls no layer whose inputs could be seen
    # and keeps query, key and value in one bare tensor.
    Exclusion(r"(^|\.)head\.", "pooling head: reads the image with one probe"),
    *_COMMON,
    Exclusion(r"^logit_bias$", "bias of the contrastive loss"),
)


def weight_specs(kind: Kind, model: nn.Module) -> Iterator[WeightSpec]:
    """Every prunable weight in the order of the model's parameters: all layers of the towers.

    Names are those that these parts have in the other families: `vision.{i}.attention.query`,
    `vision.{i}.mlp.fc1`, `text.{i}.self.query`, `text.{i}.ffn.fc1`.

    Raises:
        UnsupportedError: if something else stands where a linear layer should be.
    """
    for path, module in model.named_modules():
        match = _LAYER.fullmatch(path)
        if match is None:
            continue
        modality = match[1] or kind.value
        part = _PARTS[modality].get(match[3])
        if part is None:
            continue
        check_linear(path, module)
        depth = int(match[2])
        name = f"{modality}.{depth}.{part}"
        yield WeightSpec(name, modality, depth, (Owner(path, modality),))


def downstream_paths(
    task: str, kind: Kind, model: nn.Module, family: str
) -> dict[str, tuple[str, ...]]:
    """By canonical name the parameter paths in the model of `task`.

    - `pretraining`: this model, of any class.
    - `retrieval`: the dual encoder itself.
    - `classification`: `...ForImageClassification`, which has the vision tower at the same paths;
      the text tower maps to `()`.

    Raises:
        UnsupportedError: if the task is unknown, or the model is not the dual encoder.
    """
    tasks = ("pretraining", "retrieval", Kind.CLASSIFIER.value)
    if task not in tasks:
        raise UnsupportedError(
            f"{family} knows no downstream task {task!r}; it knows: {', '.join(tasks)}"
        )
    if task != "pretraining" and kind is not Kind.DUAL:
        raise UnsupportedError(
            f"{type(model).__name__} is not the dual encoder, so its weights do not go to a model "
            f"of {task}; give the model that was pre-trained"
        )
    left_out = TEXT if task == Kind.CLASSIFIER else None
    return {
        spec.name: () if spec.modality == left_out else (spec.owners[0].path,)
        for spec in weight_specs(kind, model)
    }
