"""The demo's chat model: a small LLaVA that captions the scenes and answers questions about them.

All of it is transformers' own: a CLIP tower, a projector, a Qwen2 decoder in which two query heads
share a key-value head, a byte-level tokenizer, a chat template, `LlavaProcessor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from benchmarks.demo import captions
from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.demo.conversations import BRIEFLY, CAPTION_PROMPTS, KINDS, Conversation, ask
from benchmarks.demo.language import Fact
from benchmarks.demo.processors import build_image_processor, normalise
from benchmarks.demo.scenes import CELL_SIZE, CHAT_OBJECTS, GRID, IMAGE_SIZE
from vlp_plugins.data.chat import IGNORED

WEIGHT_STD = 0.02  # of every matrix, filter and embedding at the start
IMAGE, START, END, PAD = "<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
IMAGE_TOKENS = (IMAGE_SIZE // CELL_SIZE) ** 2
MAX_TOKENS = 512
CAPTION_TOKENS, ANSWER_TOKENS = 48, 4  # the longest that is generated
BATCH = 200

TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- set said = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set said.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set said.text = said.text
                + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- said.text + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- said.text + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make one token of every word that the scenes are spoken of in.

    Other words are spelt in bytes, so any text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END, IMAGE)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=MAX_TOKENS,
    )


def _corpus() -> list[str]:
    """Sentences that hold every word of captions, questions, answers and prompts."""
    rng = np.random.default_rng(0)
    texts = [*CAPTION_PROMPTS, BRIEFLY, "user\n", "assistant\n", "system\n"]
    for _ in range(3000):
        facts = [
            Fact(int(rng.integers(len(COLOURS))), int(rng.integers(len(DIGITS))), int(cell))
            for cell in rng.permutation(IMAGE_TOKENS)[: rng.integers(1, CHAT_OBJECTS[1] + 1)]
        ]
        texts.append(captions.write(facts, rng))
        for kind in KINDS:
            question = ask(kind, facts, rng)
            texts += [question.text, *question.answers]
    return texts


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's processor with the Pillow image processor (no torchvision)."""
    return LlavaProcessor(
        image_processor=build_image_processor("xvlm"),
        tokenizer=tokenizer,
        patch_size=CELL_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


def build(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A new model, every matrix drawn with the same spread from torch's global generator."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=CELL_SIZE,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("class_embedding"):
                parameter.normal_(std=WEIGHT_STD)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, int64 `[n, longest]`, as the chat template words the conversations.

    Labels are the tokens of the answers, each with the token that ends it; -100 elsewhere.
    """
    pieces = []
    for conversation in conversations:
        opening = ""
        for question, answer in conversation:
            shown = "" if opening else IMAGE * IMAGE_TOKENS + "\n"
            pieces += [opening + _prompt(shown + question), answer + END]
            opening = "\n"
    encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    rows, targets = [], []
    for conversation in conversations:
        row: list[int] = []
        target: list[int] = []
        for _ in conversation:
            asked, answered = next(encoded), next(encoded)
            row += asked + answered
            target += [IGNORED] * len(asked) + answered
        rows.append(torch.tensor(row))
        targets.append(torch.tensor(target))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, mask, labels


def _prompt(text: str) -> str:
    """What the model reads before it answers."""
    return f"{START}user\n{text}{END}\n{START}assistant\n"


def look(model: Any, images: Tensor) -> Any:
    """What the tower and the projector make of images uint8 `[n, 3, 48, 48]`."""
    return model.get_image_features(pixel_values=normalise(images))


def answer_loss(
    model: Any, tokenizer: Any, seen: Any, conversations: Sequence[Conversation]
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, given what was seen; see `look`."""
    ids, mask, labels = encode(tokenizer, conversations)
    loss: Tensor = model(
        input_ids=ids, attention_mask=mask, labels=labels, mm_encoder_outputs={"image": seen}
    ).loss
    return loss


def naming_loss(model: Any, tokenizer: Any, seen: Any, scenes: Sequence[Sequence[Fact]]) -> Tensor:
    """Mean cross-entropy of the words for what each image token shows, read off its embedding.

    The words, by the decoder's last normalisation and the (tied) output embeddings, are row and
    column of a cell, and the colour and the digit in it, or twice the padding token if it is
    empty: a quarter each. So the tower learns what is where, and the projector to speak in the
    decoder's words: the part of the pre-trained towers that a large LLaVA starts from.

    Args:
        model: its tower sees one cell of the grid in each patch.
        tokenizer: the model's.
        seen: see `look`.
        scenes: the objects of every image.
    """
    colours = [_token(tokenizer, names[0]) for names in COLOURS]
    digits = [_token(tokenizer, name) for name in DIGITS]
    target = torch.zeros(len(scenes), IMAGE_TOKENS, len(tokenizer))
    for cell in range(IMAGE_TOKENS):
        words = ROWS[cell // GRID], COLUMNS[cell % GRID]
        target[:, cell, [_token(tokenizer, word) for word in words]] = 0.25
    target[..., tokenizer.pad_token_id] = 0.5
    for row, facts in enumerate(scenes):
        for colour, digit, cell in facts:
            target[row, cell, tokenizer.pad_token_id] = 0
            target[row, cell, [colours[colour], digits[digit]]] = 0.25
    embedded = torch.stack(list(seen.pooler_output))
    logits = model.lm_head(model.model.language_model.norm(embedded))
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


def _token(tokenizer: Any, word: str) -> int:
    (token,) = tokenizer.encode(" " + word, add_special_tokens=False)
    return int(token)


@torch.inference_mode()
def reply(
    model: Any, tokenizer: Any, images: Tensor, asked: Sequence[str], *, longest: int
) -> list[str]:
    """Greedy answers to one question about each image.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        images: uint8 `[n, 3, 48, 48]`.
        asked: n questions.
        longest: most tokens of an answer.
    """
    answers: list[str] = []
    for start in range(0, len(asked), BATCH):
        rows = slice(start, start + BATCH)
        texts = [_prompt(IMAGE * IMAGE_TOKENS + "\n" + question) for question in asked[rows]]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        tokens = model.generate(
            **inputs,
            pixel_values=normalise(images[rows]),
            max_new_tokens=longest,
            do_sample=False,
        )
        said = tokens[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(said, skip_special_tokens=True)
    return answers


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """A saved chat model and its tokenizer."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
