"""Where the weights of X-VLM go in the downstream models of the original code base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlp_adapters.xvlm.layers import FUSION, weight_specs
from vlp_plugins.adapter import WeightSpec
from vlp_plugins.errors import UnsupportedError

if TYPE_CHECKING:
    from vlp_adapters.xvlm.modeling import XvlmForPretraining

TASKS = ("pretraining", "retrieval", "captioning", "vqa")
_ENCODER = "text_encoder."
_BERT = "text_encoder.bert."
_NEW_IF_WIDTHS_DIFFER = ("cross.key", "cross.value")


def downstream_paths(task: str, model: XvlmForPretraining) -> dict[str, tuple[str, ...]]:
    """By canonical name the parameter paths in the model of `task`.

    - `pretraining`: those of this model.
    - `retrieval`: all but the MLM head; the text encoder loses its `bert.` part.
    - `captioning`: text and fusion layers together become the decoder.
    - `vqa`: text and fusion layers read the question; the answer decoder is made from copies of the
      fusion layers, which inherit the mask. The decoder reads text states where the encoder reads
      image tokens, so its cross-attention keys and values are copies only if both are equally
      wide, and new otherwise.

    Raises:
        UnsupportedError: if the task is unknown, or its model keeps query, key and value of a Swin
            encoder in one matrix.
    """
    if task not in TASKS:
        raise UnsupportedError(
            f"X-VLM knows no downstream task {task!r}; it knows: {', '.join(TASKS)}"
        )
    specs = list(weight_specs(model))
    if task == "pretraining":
        return {spec.name: (spec.owners[0].path,) for spec in specs}
    if model.config.vision_config.model_type == "swin":
        raise UnsupportedError(
            f"the {task} model with a Swin encoder keeps query, key and value in one matrix "
            "(attn.qkv), so a weight has no path of its own there; prune the pre-training model, "
            "save it in the original format (save_original) and fine-tune that"
        )
    if task == "retrieval":
        return {spec.name: (_encoder_path(spec),) for spec in specs}
    if task == "captioning":
        return {spec.name: (_decoder_path(spec),) for spec in specs}
    return {spec.name: _vqa_paths(spec, model) for spec in specs}


def _encoder_path(spec: WeightSpec) -> str:
    path = spec.owners[0].path
    return _ENCODER + path.removeprefix(_BERT) if path.startswith(_BERT) else path


def _decoder_path(spec: WeightSpec) -> str:
    path = spec.owners[0].path
    return f"text_decoder.{path.removeprefix(_ENCODER)}" if path.startswith(_ENCODER) else path


def _vqa_paths(spec: WeightSpec, model: XvlmForPretraining) -> tuple[str, ...]:
    config = model.config
    is_as_wide = config.vision_config.hidden_size == config.text_config.hidden_size
    is_new = spec.name.endswith(_NEW_IF_WIDTHS_DIFFER) and not is_as_wide
    if spec.modality != FUSION or is_new:
        return (_encoder_path(spec),)
    index = config.fusion_layer + spec.depth
    copied = _decoder_path(spec).replace(f".layer.{index}.", f".layer.{spec.depth}.", 1)
    return (_encoder_path(spec), copied)
