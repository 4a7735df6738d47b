"""The prunable weights of X-VLM: names, exclusions, and where they go in downstream models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vlp_adapters.kinds import check_linear, is_as_wide
from vlp_adapters.names import BERT_PARTS, CLIP_PARTS, CROSS_INPUTS, VIT_PARTS
from vlp_plugins.models.adapter import Exclusion, Owner, WeightSpec
from vlp_plugins.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval

VISION, TEXT, FUSION = "vision", "text", "fusion"

_CLIP_LAYER = re.compile(r"vision_encoder\.encoder\.layers\.(\d+)\.(\w+\.\w+)")
_BLOCK_LAYER = re.compile(
    r"vision_encoder\.(?:encoder\.)?layers\.(\d+)\.(?:blocks\.(\d+)\.)?(\w+\.\w+)"
)
_BLOCK_PARTS = {**VIT_PARTS, "downsample.reduction": "downsample.reduction"}
_TEXT_LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.(.+)")

TASKS = ("pretraining", "retrieval", "captioning", "vqa", "nlvr2")
_ENCODER = "text_encoder."
_BERT = "text_encoder.bert."

EXCLUSIONS = (
    Exclusion(r"^(vision|text)_proj\.", "projection into the common space: read by ITC only"),
    Exclusion(r"^itm_head\.", "ITM head: belongs to the matching task"),
    Exclusion(r"^bbox_head\.", "box head: belongs to the grounding task"),
    Exclusion(r"^text_encoder\.cls\.", "MLM head: belongs to pre-training"),
    Exclusion(r"\.embeddings\.", "embeddings: words, patches, positions, class token"),
    Exclusion(r"(?i)(layer_?norm|layrnorm|\.norm)\w*\.(weight|bias)$", "normalisation"),
    Exclusion(r"\.relative_position_bias\.", "relative position biases"),
    Exclusion(r"\.bias$", "bias"),
    Exclusion(r"^temp$", "temperature of the contrastive loss"),
)


def weight_specs(model: XvlmForRetrieval) -> Iterator[WeightSpec]:
    """Every prunable weight in the order of the model's parameters.

    The last layers of the text encoder are `fusion.{j}`, counted from 0 at the first layer with
    cross-attention: a canonical index is the depth within its modality, and the VQA decoder, made
    from these layers, counts them in the same way. Swin's `vision.{i}` counts blocks over all
    stages; a patch merging layer has the number of the block before it.

    Raises:
        UnsupportedError: if something else stands where a linear layer should be.
    """
    for path, module in model.named_modules():
        found = vision_part(path, model.config) or text_part(path, model.config.fusion_layer)
        if found is None:
            continue
        check_linear(path, module)
        modality, depth, part = found
        tokens = VISION if modality == VISION or part in CROSS_INPUTS else TEXT
        yield WeightSpec(f"{modality}.{depth}.{part}", modality, depth, (Owner(path, tokens),))


def downstream_paths(task: str, model: XvlmForRetrieval) -> dict[str, tuple[str, ...]]:
    """By canonical name the parameter paths in the model of `task`, as the classes here have them.

    But for the vision encoder's, they are those of the original code base's models.

    - `pretraining`: those of this model.
    - `retrieval`: all but the MLM head; the text encoder loses its `bert.` part.
    - `captioning`: text and fusion layers together become the decoder.
    - `nlvr2`: every fusion layer becomes two, which both inherit the mask.
    - `vqa`: text and fusion layers read the question; the answer decoder is made from copies of the
      fusion layers, which inherit the mask. The decoder reads text states where the encoder reads
      image tokens, so its cross-attention keys and values are copies only if both are equally
      wide, and new otherwise.

    Raises:
        UnsupportedError: if the task is unknown.
    """
    if task not in TASKS:
        raise UnsupportedError(
            f"X-VLM knows no downstream task {task!r}; it knows: {', '.join(TASKS)}"
        )
    specs = list(weight_specs(model))
    if task == "pretraining":
        return {spec.name: (spec.owners[0].path,) for spec in specs}
    if task == "retrieval":
        return {spec.name: (_encoder_path(spec),) for spec in specs}
    if task == "captioning":
        return {spec.name: (_decoder_path(spec),) for spec in specs}
    if task == "nlvr2":
        return {
            spec.name: nlvr_paths(spec.owners[0].path, model.config.fusion_layer) for spec in specs
        }
    return {spec.name: _vqa_paths(spec, model) for spec in specs}


def vision_part(path: str, config: Any) -> tuple[str, int, str] | None:
    """Modality, depth and part of a layer of the vision encoder; None for any other path."""
    vision = config.vision_config
    if vision.model_type == "clip_vision_model":
        match = _CLIP_LAYER.fullmatch(path)
        if match is None or match[2] not in CLIP_PARTS:
            return None
        return VISION, int(match[1]), CLIP_PARTS[match[2]]
    match = _BLOCK_LAYER.fullmatch(path)
    if match is None or match[3] not in _BLOCK_PARTS:
        return None
    stage = int(match[1])
    if vision.model_type == "vit":
        return VISION, stage, _BLOCK_PARTS[match[3]]
    ends = list(accumulate(vision.depths))
    # A merging layer stands after the last block of its stage.
    last = ends[stage] - 1
    depth = last if match[2] is None else ends[stage] - vision.depths[stage] + int(match[2])
    return VISION, depth, _BLOCK_PARTS[match[3]]


def text_part(path: str, fusion_layer: int) -> tuple[str, int, str] | None:
    """Modality, depth and part of a layer of the text encoder; None for any other path."""
    match = _TEXT_LAYER.fullmatch(path)
    if match is None or match[2] not in BERT_PARTS:
        return None
    index = int(match[1])
    part = BERT_PARTS[match[2]]
    return (TEXT, index, part) if index < fusion_layer else (FUSION, index - fusion_layer, part)


def nlvr_paths(path: str, fusion_layer: int) -> tuple[str, ...]:
    """Where a parameter of the pre-training model's encoders goes in the NLVR2 model."""
    match = _TEXT_LAYER.fullmatch(path)
    if match is None or int(match[1]) < fusion_layer:
        return (path.replace(_BERT, _ENCODER, 1),)
    first = 2 * int(match[1]) - fusion_layer
    return tuple(f"{_ENCODER}encoder.layer.{first + n}.{match[2]}" for n in range(2))


def _encoder_path(spec: WeightSpec) -> str:
    path = spec.owners[0].path
    return _ENCODER + path.removeprefix(_BERT) if path.startswith(_BERT) else path


def _decoder_path(spec: WeightSpec) -> str:
    path = spec.owners[0].path
    return f"text_decoder.{path.removeprefix(_ENCODER)}" if path.startswith(_ENCODER) else path


def _vqa_paths(spec: WeightSpec, model: XvlmForRetrieval) -> tuple[str, ...]:
    is_new = spec.name.endswith(CROSS_INPUTS) and not is_as_wide(model)
    if spec.modality != FUSION or is_new:
        return (_encoder_path(spec),)
    index = model.config.fusion_layer + spec.depth
    copied = _decoder_path(spec).replace(f".layer.{index}.", f".layer.{spec.depth}.", 1)
    return (_encoder_path(spec), copied)
