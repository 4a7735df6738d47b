"""The activation probe of BLIP: which towers run, on what, and which tokens are real."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vlp_adapters.blip.forward import image_tokens, text_tokens, token_count
from vlp_adapters.blip.kinds import answers_of, captions_of, encoder_ids, positions_of
from vlp_adapters.blip.weights import DECODER, ENCODER, QUESTION, TEXT, VISION
from vlp_adapters.inputs import image_pairs_of, pairs_of, texts_of
from vlp_adapters.kinds import Kind
from vlp_plugins.models.adapter import Batch, Stream, need

_NAMES = {
    Kind.PRETRAINING: (VISION, ENCODER, DECODER),
    Kind.RETRIEVAL: (VISION, ENCODER),
    Kind.CAPTIONING: (VISION, DECODER),
    Kind.VQA: (VISION, ENCODER, DECODER),
    Kind.NLVR: (VISION, ENCODER),
    Kind.DUAL: (VISION, TEXT),
}


def activation_streams(
    kind: Kind, model: Any, batch: Batch, *, published: bool
) -> Iterator[Stream]:
    """The parts of the forward in their order; neither word heads nor momentum twins run.

    - `vision`: the images. Every image token is real.
    - `encoder`: the texts, with cross-attention to the images, of NLVR2 to two for each text.
    - `decoder`: the texts after [DEC] (and the prompt of `captions_of`), with cross-attention to
      the images. That of the VQA model runs on the answers (`answers_of`), else on the questions,
      and reads the encoder's states: its `question` tokens.
    - `text`: the texts alone, where no image is read.

    With `published`, the published code's mistake is repeated: where texts are as long as the image
    has tokens, it takes the keys' and values' image tokens for text and drops those at the
    positions of padding.

    Raises:
        BatchError: if inputs are missing or do not fit each other.
    """
    if kind is Kind.VISION:
        (pixels,) = need(batch, "pixel_values")
        return iter((Stream(VISION, lambda: image_tokens(model, pixels), {VISION: None}),))
    positions = positions_of(model)
    if kind is Kind.TEXT:
        ids, mask = texts_of(batch, positions)
        return iter((Stream(TEXT, lambda: text_tokens(model, ids, mask), {TEXT: mask.bool()}),))
    read = image_pairs_of if kind is Kind.NLVR else pairs_of
    pixels, ids, mask = read(batch, positions)
    real = mask.bool()
    is_mistaken = published and ids.shape[1] == token_count(model.vision_model, *pixels.shape[-2:])
    image_real = real if is_mistaken else None
    states: dict[str, Tensor] = {}
    words, words_mask = captions_of(model, ids, mask)

    def vision() -> Tensor:
        if kind is Kind.NLVR:
            states[VISION] = model.encode_images(pixels)
        else:
            states[VISION] = image_tokens(model.vision_model, pixels)
        return states[VISION]

    def encoder() -> Tensor:
        read = encoder_ids(model, ids)
        states[ENCODER] = text_tokens(model.text_encoder, read, mask, states[VISION])
        return states[ENCODER]

    def decoder() -> Tensor:
        bert, context = model.text_decoder.bert, states[VISION]
        return text_tokens(bert, words, words_mask, context, causal=True)

    def text() -> Tensor:
        return text_tokens(model.text_model, ids, mask)

    streams = {
        VISION: Stream(VISION, vision, {VISION: None}),
        ENCODER: Stream(ENCODER, encoder, {TEXT: real, VISION: image_real}),
        DECODER: Stream(DECODER, decoder, {TEXT: words_mask.bool(), VISION: image_real}),
        TEXT: Stream(TEXT, text, {TEXT: real}),
    }
    if kind is Kind.VQA:
        streams[DECODER] = _answering(model, batch, mask, states)
    return iter([streams[name] for name in _NAMES[kind]])


def _answering(model: Any, batch: Batch, mask: Tensor, states: dict[str, Tensor]) -> Stream:
    answers = answers_of(model, batch)

    def decoder() -> Tensor:
        bert = model.text_decoder.bert
        return text_tokens(bert, answers.ids, answers.mask, states[ENCODER], mask, causal=True)

    return Stream(DECODER, decoder, {TEXT: answers.mask.bool(), QUESTION: mask.bool()})
