"""X-VLM's downstream models: how they are made, their streams, losses, captions, answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlp_adapters.answer_ranking import rank_answers
from vlp_adapters.inputs import image_pairs_of, pairs_of, truths_of
from vlp_adapters.kinds import Kind, is_of_task
from vlp_adapters.objectives import IGNORED, losses_of_pairs
from vlp_adapters.xvlm.kinds import kind_of
from vlp_adapters.xvlm.streams import matching_pairs
from vlp_adapters.xvlm.task_weights import DECODER, ENCODER, QUESTION, TEXT, VISION
from vlp_plugins.models.adapter import Batch, Negatives, Stream
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

if TYPE_CHECKING:
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval


def downstream_model(task: str, model: Any, tokenizer: Any | None) -> nn.Module:
    """The model of a task with the weights of the pre-training model.

    - `retrieval`: the pre-training model itself.
    - `nlvr2`: `XvlmForNlvr`, which has each fusion layer twice, and a new head.
    - `captioning`: `XvlmForCaptioning`, whose decoder is made of text and fusion layers.
    - `vqa`: `XvlmForQuestionAnswering`, whose decoder is a copy of the fusion layers.

    Args:
        task: one of these.
        model: of pre-training, or of the task already.
        tokenizer: its [CLS] and [SEP] begin and end what the decoder writes; None takes BERT's.

    Raises:
        UnsupportedError: if the task is unknown, the model is of another one, or [CLS] and [SEP]
            are not in its vocabulary.
    """
    if is_of_task(task, model, kind_of(model), "X-VLM"):
        whole: nn.Module = model
        return whole
    from vlp_adapters.xvlm.answering import XvlmForQuestionAnswering
    from vlp_adapters.xvlm.captioning import XvlmForCaptioning
    from vlp_adapters.xvlm.nlvr import XvlmForNlvr

    if task == Kind.NLVR:
        return XvlmForNlvr.from_pretraining(model).train(model.training)
    made: Any = XvlmForCaptioning if task == Kind.CAPTIONING else XvlmForQuestionAnswering
    try:
        there: nn.Module = made.from_pretraining(model, **_ends(tokenizer))
    except ValueError as error:
        raise UnsupportedError(f"{error}, or the tokenizer itself") from error
    return there.train(model.training)


def retrieval_losses(
    model: XvlmForRetrieval, batch: Batch, negatives: Negatives | None = None
) -> dict[str, Tensor]:
    """`itc` and `itm`, without masked words; negatives are drawn if None.

    Raises:
        BatchError: if inputs are missing or do not fit each other.
    """
    pairs = matching_pairs(model, batch)
    return losses_of_pairs(model, pairs, negatives=negatives, losses=("itc", "itm"))


def _ends(tokenizer: Any | None) -> dict[str, int]:
    """Options of a downstream model: the tokens that a tokenizer begins and ends texts with."""
    found = {
        "start_token_id": getattr(tokenizer, "cls_token_id", None),
        "end_token_id": getattr(tokenizer, "sep_token_id", None),
    }
    return {name: token for name, token in found.items() if token is not None}


def task_streams(kind: Kind, model: Any, batch: Batch) -> Iterator[Stream]:
    """The parts of the forward in their order.

    Captioning: `vision`, and `decoder` on the captions. VQA: `vision`, `encoder` on the
    questions, `decoder` on the answers of the batch, else on the questions. NLVR2: `vision` on both
    images of every row, and `encoder` on the statements.

    Raises:
        BatchError: if inputs are missing or do not fit each other.
    """
    pixels, ids, mask = _inputs(kind, model, batch)
    states: dict[str, Tensor] = {}

    def vision() -> Tensor:
        is_pair = kind is Kind.NLVR
        states[VISION] = model.encode_images(pixels) if is_pair else model.encode_image(pixels)
        return states[VISION]

    def encoder() -> Tensor:
        states[ENCODER] = model.text_encoder(ids, mask, states[VISION])
        return states[ENCODER]

    if kind is Kind.CAPTIONING:
        words, real, _ = model.decoder_inputs(ids, mask)

        def write() -> Tensor:
            tokens: Tensor = model.text_decoder.bert(words, real, states[VISION])
            return tokens

        decoder = Stream(DECODER, write, {TEXT: real.bool(), VISION: None})
        return iter((Stream(VISION, vision, {VISION: None}), decoder))
    reading = Stream(ENCODER, encoder, {TEXT: mask.bool(), VISION: None})
    if kind is Kind.NLVR:
        return iter((Stream(VISION, vision, {VISION: None}), reading))
    answers, answer_mask, _ = answers_of(model, batch)

    def answer() -> Tensor:
        tokens: Tensor = model.text_decoder.bert(answers, answer_mask, states[ENCODER], mask)
        return tokens

    return iter(
        (
            Stream(VISION, vision, {VISION: None}),
            reading,
            Stream(DECODER, answer, {TEXT: answer_mask.bool(), QUESTION: mask.bool()}),
        )
    )


def task_losses(kind: Kind, model: Any, batch: Batch) -> dict[str, Tensor]:
    """`lm`, the loss of the words of captions, or of answers (`labels`); `nlvr`, of judgements.

    Raises:
        BatchError: if inputs are missing or do not fit each other.
    """
    pixels, ids, mask = _inputs(kind, model, batch)
    if kind is Kind.CAPTIONING:
        return {"lm": model(pixels, ids, mask).loss}
    if kind is Kind.NLVR:
        return {"nlvr": model(pixels, ids, mask, truths_of(batch)).loss}
    answers, answer_mask, labels = answers_of(model, batch)
    if labels is None:
        raise BatchError(
            "the loss of a question answering model needs answers: batch has no labels (it has: "
            f"{', '.join(batch)}); add labels, the tokenized answers, int64 [B, A]"
        )
    return {"lm": model(pixels, ids, mask, answers, answer_mask, labels).loss}


def answers_of(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, mask and labels of the answers, `[B, A]`; questions take their place where none are.

    Args:
        model: an `XvlmForQuestionAnswering`.
        batch: `labels`, tokenized answers, padded with the padding token or -100.

    Raises:
        BatchError: if there is not one answer per question.
    """
    labels: Tensor | None = batch.get("labels")
    given = batch["input_ids"] if labels is None else labels
    if given.ndim != 2 or len(given) != len(batch["input_ids"]):
        raise BatchError(
            f"labels {list(given.shape)} do not fit {len(batch['input_ids'])} questions; give one "
            "row of answer tokens per question, [B, A]"
        )
    pad = model.config.text_config.pad_token_id
    ids = given.masked_fill(given == IGNORED, pad)
    real = ids != pad
    ids = torch.cat([torch.full_like(ids[:, :1], model.config.start_token_id), ids[:, 1:]], dim=1)
    if labels is None:
        return ids, batch["attention_mask"], None
    target = ids.masked_fill(~real, IGNORED)
    target[:, 0] = IGNORED
    return ids, real.long(), target


def judge(model: Any, batch: Batch) -> Tensor:
    """`[B]` log-odds that the statement of each row is true of its two images."""
    pixels, ids, mask = _inputs(Kind.NLVR, model, batch)
    logits: Tensor = model(pixels, ids, mask).logits
    return logits[:, 1] - logits[:, 0]


def _inputs(kind: Kind, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    read = image_pairs_of if kind is Kind.NLVR else pairs_of
    return read(batch, model.config.text_config.max_position_embeddings)


def write_answers(model: Any, batch: Batch, max_length: int, num_beams: int) -> Tensor:
    """Answers `[B, A]`: start token, words, end token, padding."""
    pixels, ids, mask = _inputs(Kind.VQA, model, batch)
    written: Tensor = model.generate(pixels, ids, mask, max_length, num_beams)
    return written


def choose_answers(
    model: Any, batch: Batch, answer_ids: Tensor, answer_mask: Tensor, candidates: int
) -> Tensor:
    """The most likely of a list of answers for every question, `[B]`; see `rank_answers`."""
    pixels, ids, mask = _inputs(Kind.VQA, model, batch)
    states = model.read(pixels, ids, mask)

    def decode(answers: Tensor, real: Tensor, questions: Tensor) -> Tensor:
        logits: Tensor = model.text_decoder(
            answers, real, states[questions], mask[questions]
        ).logits
        return logits

    return rank_answers(
        decode,
        len(ids),
        answer_ids,
        answer_mask,
        start=model.config.start_token_id,
        candidates=candidates,
    )
