"""From BLIP's pre-training model to the models that are fine-tuned, and their losses."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from vlp_adapters.blip.kinds import kind_of, text_config
from vlp_adapters.blip.weights import places_of_two_images
from vlp_adapters.inputs import pairs_of
from vlp_adapters.kinds import Kind, check_task, is_as_wide, is_of_task
from vlp_adapters.objectives import losses_of_pairs
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import UnsupportedError

_RETRIEVAL_LOSSES = ("itc", "itm")
_NOTHING = re.compile(r"$^")
_READS_QUESTIONS = re.compile(r"text_decoder\..*\.crossattention\.self\.(key|value)\.")
_OF_TWO_IMAGES = re.compile(r"cls_head\.|.*\.merge_layer\.")


def downstream_model(task: str, model: Any) -> nn.Module:
    """The model of a task with the weights of the pre-training model.

    - `retrieval`: the pre-training model itself, whose momentum networks and queues take part in
      fine-tuning as in the original; or `BlipForImageTextRetrieval`, as it is.
    - `captioning`: `BlipForConditionalGeneration`.
    - `vqa`: `BlipForQuestionAnswering`; what encoder and decoder shared is copied into both. If
      image tokens are not as wide as texts it is our `BlipForAnswering`, and keys and values of the
      decoder's cross-attention, which reads the question, are new.
    - `nlvr2`: `BlipForNlvr`; cross-attention is copied for each of the two images, and what merges
      them and the head are new.

    Args:
        task: one of these.
        model: of pre-training, or of the task already.

    Raises:
        UnsupportedError: if the task is unknown, or the model is of another one.
    """
    if is_of_task(task, model, kind_of(model), "BLIP"):
        whole: nn.Module = model
        return whole
    return _from_pretraining(task, model)


def task_losses(task: str, model: Any, batch: Batch) -> dict[str, Tensor] | None:
    """`itc` and `itm` of a pre-training model that is fine-tuned on retrieval.

    Queues and momentum networks advance; soft targets have their whole share from the first step,
    where the original raises it during the first epoch. As in the original, earlier features of an
    image that are still in the queue count as negatives. None if the model's own losses are the
    task's.

    Raises:
        UnsupportedError: if the model is of another task.
        BatchError: if inputs are missing or do not fit each other.
    """
    kind = kind_of(model)
    check_task(task, model, kind)
    if kind == task:
        return None
    pairs = pairs_of(batch, text_config(model).max_position_embeddings)
    return losses_of_pairs(model, pairs, losses=_RETRIEVAL_LOSSES)


def _from_pretraining(task: str, model: Any) -> nn.Module:
    made = _new(task, model)
    state = model.state_dict()
    places = made.state_dict()
    new = _NOTHING
    if task == Kind.VQA and not is_as_wide(model):
        new = _READS_QUESTIONS
    elif task == Kind.NLVR:
        new = _OF_TWO_IMAGES
        state = {place: v for path, v in state.items() for place in places_of_two_images(path)}
    found = {path: state[path] for path in places if path in state and not new.match(path)}
    ties = made.all_tied_weights_keys
    lacking = [p for p in places if p not in found and p not in ties and not new.match(p)]
    if lacking:
        raise UnsupportedError(
            f"{type(model).__name__} has nothing for {lacking[0]} of {type(made).__name__}; if "
            "heads or units were cut out of it, or projections split, make the model of the task "
            "first"
        )
    made.load_state_dict(found, strict=False)
    there: nn.Module = made.to(model.device, model.dtype).train(model.training)
    return there


def _new(task: str, model: Any) -> Any:
    """The model of a task with new weights, and the sizes of the pre-training model."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering

    from vlp_adapters.blip.answering_model import BlipAnsweringConfig, BlipForAnswering
    from vlp_adapters.blip.nlvr_model import BlipForNlvr, BlipNlvrConfig

    pretraining = model.config
    text = deepcopy(pretraining.text_config)
    text.label_smoothing = pretraining.label_smoothing
    build, config = BlipForConditionalGeneration, BlipConfig
    if task == Kind.VQA and is_as_wide(model):
        build = BlipForQuestionAnswering
    elif task == Kind.VQA:
        build, config = BlipForAnswering, BlipAnsweringConfig
    elif task == Kind.NLVR:
        build, config = BlipForNlvr, BlipNlvrConfig
        text.enc_token_id = pretraining.enc_token_id
    return build(
        config(
            vision_config=pretraining.vision_config.to_dict(),
            text_config=text.to_dict(),
            image_text_hidden_size=pretraining.embed_dim,
            projection_dim=pretraining.embed_dim,
        )
    )
