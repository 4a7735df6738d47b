"""Original BLIP checkpoints to ours and back."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from vlp_adapters.blip.answering_model import BlipAnsweringConfig, BlipForAnswering
from vlp_adapters.blip.configuration import BlipPretrainConfig
from vlp_adapters.blip.kinds import kind_of
from vlp_adapters.blip.modeling import BlipForPretraining
from vlp_adapters.blip.names import (
    HEAD_BIAS,
    SECOND_HEAD_BIAS,
    from_original_name,
    is_original,
    task_of,
    to_original_name,
)
from vlp_adapters.blip.nlvr_model import BlipForNlvr, BlipNlvrConfig
from vlp_adapters.checkpoints import check_fit, fill_ties, options_of, read_state, write_state
from vlp_adapters.kinds import Kind
from vlp_adapters.shapes import (
    CheckpointShapes,
    attention_heads,
    caption_prompt,
    shapes_of,
    token_id,
)
from vlp_plugins.runtime.errors import UnsupportedError

_log = logging.getLogger(__name__)

_OPTIONS = ("vision_heads", "text_heads", "sep_token_id", "prompt_ids")

_POSITIONS = ".embeddings.position_embeddings.weight"  # the original numbers each such table
_WORDS = 30524
_BERT_SEP = 102  # id of [SEP] in the vocabulary of BERT, which BLIP extends
_QUEUES = ("image_queue", "text_queue")
_RETRIEVAL_STATE = ("temp", "image_queue", "text_queue", "idx_queue", "ptr_queue")
_QUEUE_SIZE = 57600
_TEMPERATURE = 0.07
_LABEL_SMOOTHING = 0.1
_FOLLOWED = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
_NO_IMAGE = -100  # in `idx_queue`
_CLASSES: dict[Kind, Any] = {
    Kind.PRETRAINING: BlipForPretraining,
    Kind.RETRIEVAL: BlipForImageTextRetrieval,
    Kind.CAPTIONING: BlipForConditionalGeneration,
    Kind.VQA: BlipForQuestionAnswering,
    Kind.NLVR: BlipForNlvr,
}
_FAMILY = {
    Kind.PRETRAINING: "BLIP pre-training",
    Kind.RETRIEVAL: "BLIP retrieval",
    Kind.CAPTIONING: "BLIP captioning",
    Kind.VQA: "BLIP question answering",
    Kind.NLVR: "BLIP NLVR2",
}


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an original checkpoint; computed buffers are left out.

    Raises:
        UnsupportedError: if both names of the bias of the word head are there, with other values.
    """
    first, second = state.get(HEAD_BIAS), state.get(SECOND_HEAD_BIAS)
    if first is not None and second is not None and not torch.equal(first, second):
        raise UnsupportedError(f"{SECOND_HEAD_BIAS} differs from {HEAD_BIAS}, but BLIP ties them")
    named = ((from_original_name(original), tensor) for original, tensor in state.items())
    return {name: tensor for name, tensor in named if name is not None}


def state_to_original(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of `model` as the original code saves it, on the CPU.

    Shared tensors are there under every name; includes the `position_ids` that the original has.
    Of retrieval, whose class here has neither momentum copies nor queues, the copies are equal to
    their networks and the queues random, as at the start of a training; if it was loaded from a
    file without them, they are left out again.

    Args:
        model: of pre-training, retrieval, captioning, VQA or NLVR2.

    Raises:
        UnsupportedError: if it is another class, or its projections are split.
    """
    if kind_of(model) not in _CLASSES:
        raise UnsupportedError(
            f"{type(model).__name__} has no original file: BLIP's code base saves models of "
            "pre-training, retrieval, captioning, VQA and NLVR2"
        )
    state = model.state_dict()
    if split := next((name for name in state if ".self_attn.q_proj." in name), None):
        raise UnsupportedError(
            f"{split} is a part of what the original has as one projection; save the model as it "
            "was before its projections were split"
        )
    result = {to_original_name(name): value.cpu() for name, value in state.items()}
    if HEAD_BIAS in result:
        result[SECOND_HEAD_BIAS] = result[HEAD_BIAS]
    for name in [name for name in result if name.endswith(_POSITIONS)]:
        ids = torch.arange(len(result[name]), device="cpu").expand(1, -1)
        result[name.replace(_POSITIONS, ".embeddings.position_ids")] = ids
    size = getattr(model.config, "queue_size", _QUEUE_SIZE)
    if kind_of(model) is Kind.RETRIEVAL and size:
        result |= _momentum_state(model.config, size, result)
    return result


def load_original(
    path: str | os.PathLike[str],
    config: PreTrainedConfig | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads an original BLIP checkpoint, in evaluation mode, into the class of its task.

    - pre-training: `BlipForPretraining`. A checkpoint that was stripped of all momentum twins, or
      of the queues, is accepted: the twins start as copies of their networks, the queues at random.
    - retrieval: transformers' `BlipForImageTextRetrieval`, without momentum twins and queues, which
      only a training reads; fine-tuned further, it contrasts within the batch.
    - captioning, VQA: `BlipForConditionalGeneration`, `BlipForQuestionAnswering` of transformers;
      `BlipForAnswering` where image tokens are not as wide as texts.
    - NLVR2: `BlipForNlvr`.

    What shapes do not tell may also be in a JSON file next to the checkpoint; see `options_of`.

    Args:
        path: `.pth` with `{"model": state_dict}`, a bare state_dict, or `.safetensors`.
        config: sizes; None to read them from the shapes (see `infer_config`).
        **options: `vision_heads`, `text_heads`, `sep_token_id`, `prompt_ids`; see `infer_config`.

    Raises:
        UnsupportedError: if the file cannot be read, or its tensors do not fit the model.
    """
    original = read_state(path)
    kind = task_of(original.keys())
    if kind is None:
        raise UnsupportedError(
            f"{path} is no BLIP pre-training checkpoint, nor one of retrieval, captioning, VQA or "
            "NLVR2" + (": it has the towers without a head" if is_original(original.keys()) else "")
        )
    said = options_of(path, _OPTIONS, options, config)
    if config is None:
        with shapes_of(path, "BLIP"):
            config = infer_config(original, **said)
    answers = kind is Kind.VQA and isinstance(config, BlipAnsweringConfig)
    model_class = BlipForAnswering if answers else _CLASSES[kind]
    if not isinstance(config, model_class.config_class):
        raise UnsupportedError(
            f"{path} is a {_FAMILY[kind]} checkpoint; its configuration is a "
            f"{model_class.config_class.__name__}, not a {type(config).__name__}"
        )
    with no_init_weights():  # all are loaded
        model = model_class(config)
    model.tie_weights()  # which is left out as well
    expected = model.state_dict()
    state = state_from_original(original)
    fill_ties(path, state, model.all_tied_weights_keys, _FAMILY[kind], to_original_name)
    if kind is Kind.PRETRAINING:
        _fill_momentum_state(state, expected)
    if kind is Kind.RETRIEVAL:
        state = _online(path, state)
    check_fit(path, state, expected, _FAMILY[kind], to_original_name)
    model.load_state_dict(state)
    return model.eval()


def infer_config(
    state: Mapping[str, Tensor],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    sep_token_id: int | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> PreTrainedConfig:
    """Reads sizes from the tensors of an original checkpoint (original names).

    Shapes do not tell the number of attention heads: it is taken as width / 64, which holds for
    the published sizes. The last two words of the vocabulary are `[DEC]` and `[ENC]`, as the
    original appends them to BERT's.

    Args:
        state: tensors by original name.
        vision_heads: heads per layer of the vision encoder; None for width / 64.
        text_heads: heads per layer of the text towers; None for width / 64.
        sep_token_id: the word that ends a text, [SEP]; None for that of bert-base-uncased.
        prompt_ids: of captioning: what stands between [DEC] and every caption; None for `a picture
            of` in bert-base-uncased.

    Returns:
        `BlipPretrainConfig`; for the file of a task transformers' `BlipConfig`, or ours of
        `BlipForAnswering` or `BlipForNlvr`.

    Raises:
        UnsupportedError: if it is no BLIP checkpoint, or something that shapes do not tell is
            needed or wrong.
    """
    shapes = CheckpointShapes(state, "BLIP")
    kind = task_of(state.keys()) or Kind.PRETRAINING
    tower = "text_decoder.bert." if kind is Kind.CAPTIONING else "text_encoder."
    attention = "self0" if kind is Kind.NLVR else "self"
    words, width = shapes[f"{tower}embeddings.word_embeddings.weight"]
    layer, number = f"{tower}encoder.layer.", re.escape(f"{tower}encoder.layer.") + r"(\d+)"
    layers = shapes.indices(number)
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=shapes[f"{layer}0.crossattention.{attention}.key.weight"][1],
        intermediate_size=shapes[f"{layer}0.intermediate.dense.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=attention_heads(width, "text", text_heads),
        max_position_embeddings=shapes[f"{tower}embeddings.position_embeddings.weight"][0],
        bos_token_id=words - 2,
        sep_token_id=_sep(sep_token_id, words),
    )
    vision = _vision(shapes, vision_heads)
    queue = state.get("image_queue")
    options: dict[str, Any] = {} if queue is None else {"queue_size": queue.shape[1]}
    if kind is Kind.PRETRAINING:
        return BlipPretrainConfig(
            vision_config=vision,
            text_config=text,
            embed_dim=shapes["text_proj.weight"][0],
            dec_token_id=words - 2,
            enc_token_id=words - 1,
            **options,
        )
    if kind in (Kind.CAPTIONING, Kind.VQA):
        text.label_smoothing = _LABEL_SMOOTHING
    if kind is Kind.CAPTIONING:
        text.prompt_ids = caption_prompt(prompt_ids, words, is_bert=words == _WORDS)
    else:
        text.enc_token_id = words - 1
    if kind is Kind.RETRIEVAL:
        options = {"queue_size": 0} | options
        options["image_text_hidden_size"] = shapes["text_proj.weight"][0]
        if (temperature := state.get("temp")) is not None:
            options["contrastive_temperature"] = float(temperature)
    build = BlipConfig
    if kind is Kind.VQA and vision.hidden_size != width:
        build = BlipAnsweringConfig
    elif kind is Kind.NLVR:
        build = BlipNlvrConfig
        merging = shapes.indices(rf"{number}\.crossattention\.output\.merge_layer\.")
        options["merged_from"] = min(merging, default=len(layers))
    return build(vision_config=vision.to_dict(), text_config=text.to_dict(), **options)


def save_original(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Writes `model` in the original format: `{"model": state_dict}`, or `.safetensors`.

    Raises:
        UnsupportedError: see `state_to_original`.
    """
    write_state(state_to_original(model), path)


def _fill_momentum_state(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Adds, in place, what a checkpoint was stripped of."""
    if not any("_m." in name for name in state):
        twins = ((name, name.replace("_m.", ".", 1)) for name in expected if "_m." in name)
        state |= {twin: state[online] for twin, online in twins if online in state}
    if not any(name in state for name in (*_QUEUES, "queue_ptr")):
        state |= {name: _drawn(expected[name].shape) for name in _QUEUES}
        state["queue_ptr"] = torch.zeros_like(expected["queue_ptr"])


def _online(path: str | os.PathLike[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the retrieval class has of a file."""
    kept = {
        name: value
        for name, value in state.items()
        if name not in _RETRIEVAL_STATE and not name.split(".")[0].endswith("_m")
    }
    if dropped := len(state) - len(kept):
        _log.info(
            "%s: %d momentum copies and queues were left out, which only a training reads",
            path, dropped,
        )  # fmt: skip
    return kept


def _momentum_state(config: Any, size: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a retrieval file has besides the networks, as at the start of a training."""
    found = {
        name.replace(".", "_m.", 1): value
        for name, value in state.items()
        if name.startswith(_FOLLOWED)
    }
    generator = torch.Generator().manual_seed(0)
    found |= {n: _drawn((config.image_text_hidden_size, size), generator) for n in _QUEUES}
    found["idx_queue"] = torch.full((1, size), _NO_IMAGE)
    found["ptr_queue"] = torch.zeros(1, dtype=torch.int64)
    found["temp"] = torch.tensor(getattr(config, "contrastive_temperature", _TEMPERATURE))
    return found


def _drawn(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """A queue of random features `[D, Q]`."""
    return functional.normalize(torch.randn(tuple(shape), generator=generator), dim=0)


def _sep(given: int | None, words: int) -> int:
    """The id of [SEP]."""
    if given is None and words != _WORDS:
        _log.warning(
            "the vocabulary has %d words and is not that of BLIP (%d); [SEP] is taken to be %d; "
            "sep_token_id says otherwise",
            words, _WORDS, _BERT_SEP,
        )  # fmt: skip
    return token_id("sep_token_id", _BERT_SEP if given is None else given, words)


def _vision(shapes: CheckpointShapes, heads: int | None) -> BlipVisionConfig:
    return BlipVisionConfig(
        **shapes.vision_transformer("visual_encoder.", heads), layer_norm_eps=1e-6
    )
