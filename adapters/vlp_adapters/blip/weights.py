"""The prunable weights of BLIP: names, exclusions, and where they go in downstream classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from vlp_adapters.blip.kinds import kind_of
from vlp_adapters.kinds import Kind, check_linear, is_as_wide
from vlp_adapters.names import BERT_PARTS, CROSS_INPUTS
from vlp_plugins.models.adapter import Exclusion, Owner, WeightSpec
from vlp_plugins.runtime.errors import UnsupportedError

VISION, TEXT, QUESTION = "vision", "text", "question"
ENCODER, DECODER = "encoder", "decoder"

_TOWERS = {  # kind -> where its towers begin, and what they are
    Kind.PRETRAINING: {
        "vision_model.": VISION,
        "text_encoder.": ENCODER,
        "text_decoder.bert.": DECODER,
    },
    Kind.RETRIEVAL: {"vision_model.": VISION, "text_encoder.": ENCODER},
    Kind.CAPTIONING: {"vision_model.": VISION, "text_decoder.bert.": DECODER},
    Kind.VQA: {"vision_model.": VISION, "text_encoder.": ENCODER, "text_decoder.bert.": DECODER},
    Kind.NLVR: {"vision_model.": VISION, "text_encoder.": ENCODER},
    Kind.DUAL: {"vision_model.": VISION, "text_model.": ENCODER},
    Kind.VISION: {"": VISION},
    Kind.TEXT: {"": ENCODER},
}
_READS_NO_IMAGE = (Kind.DUAL, Kind.TEXT)

_VISION_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(\w+\.\w+)")
_VISION_PARTS = {
    "self_attn.qkv": "attention.qkv",
    "self_attn.q_proj": "attention.query",  # of a split attention, in place of `qkv`
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.projection": "attention.output",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_IMAGES = ("0", "1")
_OF_TWO_IMAGES = {  # path in a layer that attends to two images -> its name, the pre-training one's
    path.replace(".self.", f".self{image}.").replace(".dense", f".dense{image}"): (
        name.replace("cross.", f"cross{image}."), name,
    )
    for path, name in BERT_PARTS.items()
    for image in _IMAGES
    if name.startswith("cross.")
}  # fmt: skip
_TEXT_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")

_TASK_TOWERS = {  # task -> which towers of the pre-training model its class has, by equal paths
    "pretraining": ("vision_model.", "text_encoder.", "text_decoder."),
    "retrieval": ("vision_model.", "text_encoder."),
    "captioning": ("vision_model.", "text_decoder."),
    "vqa": ("vision_model.", "text_encoder.", "text_decoder."),
    "nlvr2": ("vision_model.", "text_encoder."),
}

EXCLUSIONS = (
    Exclusion(
        r"^(vision_model|text_encoder|vision_proj|text_proj)_m\.",
        "momentum copy: follows its network and is dropped after pre-training",
    ),
    Exclusion(r"^(vision|text)_proj\.", "projection into the common space: read by ITC only"),
    Exclusion(r"^(visual|text)_projection\.", "projection into the common space"),
    Exclusion(r"^itm_head\.", "ITM head: belongs to the matching task"),
    Exclusion(r"^cls_head\.", "head: says whether a statement is true"),
    Exclusion(r"\.merge_layer\.", "new in this model: merges what is read of two images"),
    Exclusion(r"^text_decoder\.cls\.", "LM head: its matrix is the word embeddings"),
    Exclusion(r"(^|\.)pooler\.", "pooler: a head that reads the first token only"),
    Exclusion(r"(^|\.)embeddings\.", "embeddings: words, patches, positions, class token"),
    Exclusion(r"(?i)layer_?norm\w*\.(weight|bias)$", "normalisation"),
    Exclusion(r"\.bias$", "bias"),
    Exclusion(r"\.crossattention\.", "cross-attention: this class never reads images with it"),
    Exclusion(r"^(temp|logit_scale)$", "temperature of the contrastive loss"),
)


_NEW = Exclusion(
    r"^text_decoder\..*\.crossattention\.self\.(key|value)\.",
    "new in this model: reads text states, which are not as wide as image tokens",
)


def exclusions(model: nn.Module) -> tuple[Exclusion, ...]:
    """What is not pruned."""
    return (_NEW, *EXCLUSIONS) if _has_new(model) else EXCLUSIONS


def weight_specs(model: nn.Module) -> Iterable[WeightSpec]:
    """Every prunable weight in the order of the model's parameters.

    Names are those of the pre-training model wherever a weight plays the same part: `vision.{i}.*`,
    with `attention.query`, `.key` and `.value` in place of `attention.qkv` where it is split;
    `text.{i}.*`, the encoder with the cross-attention and feed-forward that the decoder shares;
    `decoder.{i}.self.*`. In the VQA model the decoder has its own `decoder.{i}.cross.*` and
    `decoder.{i}.ffn.*`, which began as copies; they read the question where the encoder reads
    image tokens. Keys and values that could not be copied, because texts and image tokens are not
    equally wide, are left out. In the NLVR2 model the encoder has its cross-attention twice,
    `text.{i}.cross0.*` for the left image and `text.{i}.cross1.*` for the right one.

    Raises:
        UnsupportedError: if something else stands where a linear layer should be.
    """
    specs: dict[str, WeightSpec] = {}
    for path, module in model.named_modules():
        spec = _spec(model, path)
        if spec is None:
            continue
        check_linear(path, module)
        if known := specs.get(spec.name):  # shared by encoder and decoder, the encoder comes first
            spec = replace(known, owners=known.owners + spec.owners)
        specs[spec.name] = spec
    return specs.values()


def downstream_paths(task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """By canonical name the parameter paths in the model of `task`.

    - `pretraining`: this model; what encoder and decoder share has both paths.
    - `retrieval`: `BlipForImageTextRetrieval`, the vision and the text encoder.
    - `captioning`: `BlipForConditionalGeneration`, the vision encoder and the text decoder; the
      self-attention of the text encoder maps to `()`.
    - `vqa`: `BlipForQuestionAnswering`; what encoder and decoder shared is copied into both, but
      for cross-attention keys and values if texts and image tokens are not equally wide.
    - `nlvr2`: `BlipForNlvr`, the vision and the text encoder; its cross-attention is copied, one
      for each image.

    Args:
        task: one of these.
        model: the pre-training model; for `pretraining` any claimed model, whose own paths those
            are.

    Raises:
        UnsupportedError: if the task is unknown, or the model is a downstream one already.
    """
    if task not in _TASK_TOWERS:
        raise UnsupportedError(
            f"BLIP knows no downstream task {task!r}; it knows: {', '.join(_TASK_TOWERS)}"
        )
    specs = weight_specs(model)
    if task == Kind.PRETRAINING:
        return {spec.name: tuple(owner.path for owner in spec.owners) for spec in specs}
    if kind_of(model) is not Kind.PRETRAINING:
        raise UnsupportedError(
            f"{type(model).__name__} is no pre-training model, so its weights do not go to the "
            f"{task} model; give BlipForPretraining"
        )
    towers = _TASK_TOWERS[task]
    found = {}
    for spec in specs:
        is_new = task == Kind.VQA and spec.name.endswith(CROSS_INPUTS) and not is_as_wide(model)
        here = towers[:-1] if is_new else towers  # the decoder's are not copies
        paths = tuple(o.path for o in spec.owners if o.path.startswith(here))
        if task == Kind.NLVR:
            paths = tuple(place for path in paths for place in places_of_two_images(path))
        found[spec.name] = paths
    return found


def places_of_two_images(path: str) -> tuple[str, ...]:
    """Where a parameter of the text encoder goes in one that attends to two images."""
    before, cross, part = path.partition(".crossattention.")
    if not cross or "LayerNorm" in part:
        return (path,)
    return tuple(
        before + cross + part.replace("self.", f"self{n}.", 1).replace(".dense.", f".dense{n}.")
        for n in _IMAGES
    )


def _spec(model: nn.Module, path: str) -> WeightSpec | None:
    kind = kind_of(model)
    towers = _TOWERS[kind].items() if kind else ()
    for beginning, tower in towers:
        if not path.startswith(beginning):
            continue
        is_vision = tower == VISION
        layer, parts = (_VISION_LAYER, _VISION_PARTS) if is_vision else (_TEXT_LAYER, BERT_PARTS)
        match = layer.fullmatch(path, len(beginning))
        if match is not None and match[2] in _OF_TWO_IMAGES:
            part, origin = _OF_TWO_IMAGES[match[2]]
            owner = Owner(path, VISION if origin in CROSS_INPUTS else TEXT)
            place = f"{TEXT}.{match[1]}"
            return WeightSpec(
                f"{place}.{part}", TEXT, int(match[1]), (owner,), copy_of=f"{place}.{origin}"
            )
        if match is None or match[2] not in parts:
            return None
        index, part = int(match[1]), parts[match[2]]
        if is_vision:
            name = f"{VISION}.{index}.{part}"
            return WeightSpec(name, VISION, index, (Owner(path, VISION),))
        if kind in _READS_NO_IMAGE and part.startswith("cross."):
            return None
        if tower == DECODER and part in CROSS_INPUTS and _has_new(model):
            return None
        return _text_spec(path, index, part, tower, is_copied=kind is Kind.VQA)
    return None


def _text_spec(path: str, index: int, part: str, tower: str, *, is_copied: bool) -> WeightSpec:
    """A weight of a text tower; `is_copied` if the decoder has copies of what it else shares."""
    tokens = TEXT
    if part in CROSS_INPUTS:
        tokens = QUESTION if is_copied and tower == DECODER else VISION
    owners = (Owner(path, tokens),)
    shared = f"{TEXT}.{index}.{part}"
    own = f"{DECODER}.{index}.{part}"
    if tower == ENCODER:
        return WeightSpec(shared, TEXT, index, owners)
    if part.startswith("self."):
        return WeightSpec(own, TEXT, index, owners)
    if is_copied:
        return WeightSpec(own, TEXT, index, owners, copy_of=shared)
    return WeightSpec(shared, TEXT, index, owners)


def _has_new(model: Any) -> bool:
    """Whether keys and values of a VQA decoder could not be copied from the encoder."""
    return kind_of(model) is Kind.VQA and not is_as_wide(model)
