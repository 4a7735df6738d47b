"""The processor of a chat model: conversations in its template, with labels on what is answered."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from vlp_plugins.data.conversations import LETTERS, Asked, Conversation
from vlp_plugins.data.processors import Processor, most_pixels
from vlp_plugins.runtime.errors import DataError, first_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

CAPTION_PROMPT = "Describe the image."
"""What the user says before a caption, if nothing else is asked for."""

QUESTION_PROMPT = "{question}\nAnswer the question using a single word or phrase."
"""What the user says to ask a question whose answer is compared with those of people."""

CHOICE_PROMPT = (
    "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
)
"""What the user says to ask a question with choices, each with a letter."""

IGNORED = -100
"""In `labels`: a position that the loss leaves out."""

# Characters for private use stand for an answer while the template is filled in.
_SENTINEL = "\ue0f0{}\ue0f1"
_SENTINELS = re.compile("\ue0f0(\\d+)\ue0f1")


def chat_processor(
    processor: Processor,
    *,
    prompt: str | None = None,
    max_pixels: int | None = None,
    continues: bool = False,
) -> Processor:
    """The processor of a chat model as one that reads captions and conversations.

    Args:
        processor: of transformers. One without a chat template is returned as it is, and so is
            what this function made if nothing else is asked for.
        prompt: see `ChatProcessor`.
        continues: the model writes on after a text, so that it needs no template: BLIP-2,
            PaliGemma.
        max_pixels: most pixels of an image where the processor keeps the size of images, as
            Qwen-VL's does; None leaves that to the processor.
    """
    if isinstance(processor, ChatProcessor):
        if prompt is None and max_pixels is None:
            return processor
        prompt, processor = prompt or processor.prompt, processor.inner
    if _template_of(processor) is None and not (continues and _reads_both(processor)):
        return processor
    if max_pixels is not None:
        processor = _capped(processor, max_pixels)
    return ChatProcessor(processor, prompt=prompt)


def _reads_both(processor: Any) -> bool:
    """Whether it reads text and images, and the text as it stands, by one tokenizer."""
    parts = ("tokenizer", "image_processor")
    one = all(getattr(processor, part, None) is not None for part in parts)
    return one and getattr(processor, "qformer_tokenizer", None) is None


class ChatProcessor:
    """Makes batches of conversations, with labels on what the assistant says.

    Attributes:
        prompt: what was given in place of both of these; None: `CAPTION_PROMPT` and
            `QUESTION_PROMPT`, or what a model that needs no template has learned.
        caption_prompt: what the user says before a caption.
        question_prompt: what the user says to ask a question without choices, `{question}`.
    """

    def __init__(self, inner: Any, *, prompt: str | None = None) -> None:
        self.inner, self.prompt = inner, prompt
        self.tokenizer, self.image_processor = inner.tokenizer, inner.image_processor
        self._in_parts: bool | None = None
        self._continues = _template_of(inner) is None
        self._takes_suffix = self._continues and "suffix" in signature(inner.__call__).parameters
        usual = CAPTION_PROMPT, QUESTION_PROMPT
        if self._takes_suffix:
            usual = "caption en", "answer en {question}"
        elif self._continues:
            usual = "", "Question: {question} Answer:"
        self.caption_prompt, self.question_prompt = usual if prompt is None else (prompt, prompt)

    def caption(self, text: str | None, *, images: int = 1) -> Conversation:
        """A conversation that ends with a caption, or asks for one."""
        return Conversation.about(self.caption_prompt, text, images=images)

    def question(self, asked: Asked, *, images: int = 1) -> Conversation:
        """A conversation that ends with an answer, or asks for one."""
        prompt = self.question_prompt
        if asked.choices and self.prompt is None:
            prompt = CHOICE_PROMPT
        if "{question}" not in prompt:
            prompt = f"{prompt}\n{{question}}"
        if asked.choices and "{choices}" not in prompt:
            prompt = prompt.replace("{question}", "{question}\n{choices}")
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, asked.choices, strict=False)]
        said = prompt.replace("{choices}", "\n".join(lines)).replace("{question}", asked.question)
        answer = asked.answer
        if answer is not None and answer in asked.choices:
            answer = LETTERS[asked.choices.index(answer)]
        return Conversation.about(said, answer, images=images)

    def __call__(
        self, *, images: Any = None, text: Any = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Makes one batch; how it is padded is decided here.

        Args:
            images: for each of `B` samples an image, or a list of images; None for no images.
            text: for each a `Conversation`, a question (`Asked`), or the caption that answers the
                prompt.

        Returns:
            `input_ids`, `attention_mask` `[B, T]` and all that the processor makes of the images.
            If the conversations end with an answer: `labels` `[B, T]` int64, the ids of answers
            and of what ends them, elsewhere `IGNORED`; padded on the right. If they end with the
            user: without labels, padded on the left, ready for `generate`.

        Raises:
            DataError: if the template, the tokenizer or the images do not fit the conversations.
        """
        shown = _lists(images, len(text))
        said = [self._said(each, len(own)) for each, own in zip(text, shown, strict=True)]
        for one, own in zip(said, shown, strict=True):
            if one.images != len(own):
                raise DataError(f"a conversation about {one.images} images comes with {len(own)}")
        answered = [each.answered for each in said]
        if any(answered) != all(answered):
            raise DataError("some conversations of a batch end with an answer, others do not")
        write = self._written if self._continues else self._rendered
        written, answers = zip(*map(write, said), strict=True)
        prompts, known = _numbered(written, answers)
        side = "right" if all(answered) else "left"
        inner = copy.copy(self.inner)  # batches are made in several threads
        inner.tokenizer = recorder = _Recorder(self.tokenizer, known, len(said), side)
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self._takes_suffix and all(answered):
            prompts = [_SENTINELS.sub("", each).strip() for each in prompts]
            options["suffix"] = known
            inner.tokenizer = recorder = _Recorder(self.tokenizer, [], len(said), side)
        begins = self.tokenizer.bos_token
        if begins and prompts[0].startswith(begins):  # the template writes it
            options["add_special_tokens"] = False
        try:
            made = inner(images=shown if any(shown) else None, text=prompts, **options)
        except (ValueError, TypeError, IndexError, StopIteration) as error:
            raise DataError(
                f"{type(self.inner).__name__} cannot make a batch of {len(said)} conversations "
                f"about {sum(map(len, shown))} images: {first_line(error)}"
            ) from error
        batch = {name: value for name, value in made.items() if hasattr(value, "shape")}
        if not all(answered):
            batch.pop("labels", None)
            if self._continues and not any(prompts) and not hasattr(self.inner, "image_token"):
                # The model begins by itself: what stands for no text would be continued.
                return {name: value for name, value in batch.items() if value.ndim > 2}
        elif "suffix" not in options:
            batch["labels"] = recorder.labels(batch["input_ids"])
        return self._cut(batch)

    def _written(self, said: Conversation) -> tuple[str, list[str]]:
        """`_rendered` for models that write on after a text."""
        parts = [part for message in said.messages for part in message["content"]]
        answers = [message for message in said.messages if message["role"] == "assistant"]
        if len(answers) > 1:
            raise DataError(
                f"{type(self.inner).__name__} has no chat template, so its model takes one "
                f"question with one answer, not {len(answers)}; give captions or questions"
            )
        texts = [str(self._safe(part)["text"]) for part in parts if part["type"] == "text"]
        if not answers:
            return " ".join(texts), []
        asked = [each for each in texts[:-1] if each]
        ending = "" if self._takes_suffix else str(self.tokenizer.eos_token or "")
        return " ".join([*asked, _SENTINEL.format(0) + ending]), [texts[-1].strip()]

    def _said(self, said: str | Asked | Conversation, images: int) -> Conversation:
        if isinstance(said, str):
            return self.caption(said, images=images)
        return self.question(said, images=images) if isinstance(said, Asked) else said

    def _rendered(self, said: Conversation) -> tuple[str, list[str]]:
        """The conversation in the model's template, with sentinels for answers, and the answers."""
        answers: list[str] = []
        messages = []
        for message in said.messages:
            content = [self._safe(part) for part in message["content"]]
            if message["role"] == "assistant":
                text = "".join(part.get("text", "") for part in content).strip()
                content = [{"type": "text", "text": _SENTINEL.format(len(answers))}]
                answers.append(text)
            messages.append({"role": message["role"], "content": content})
        if self._in_parts is None:
            self._in_parts = self._takes_parts()
        rendered = self._template(messages, in_parts=self._in_parts, ask=not said.answered)
        found = _SENTINELS.findall(rendered)
        if found != [str(number) for number in range(len(answers))]:
            raise DataError(
                "the chat template of the processor does not show what the assistant says "
                f"({len(found)} of {len(answers)} answers are in {rendered[:80]!r}); "
                "take another chat_template.jinja"
            )
        return rendered, answers

    def _safe(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        """A part whose text holds no placeholder of an image, for which there would be none."""
        if part["type"] != "text":
            return part
        text = _SENTINELS.sub("", str(part["text"]))
        for name in ("image_token", "video_token", "audio_token", "boi_token"):
            token = getattr(self.inner, name, None)
            if token:
                text = text.replace(str(token), "")
        return {"type": "text", "text": text}

    def _takes_parts(self) -> bool:
        """Whether the template reads contents as lists of parts, as most do, or as texts."""
        text = _SENTINEL.format(0)
        said = [Conversation.about(text, images=count).messages for count in (0, 1)]
        try:
            plain, shown = (self._template(each, in_parts=True, ask=True) for each in said)
        except DataError:
            return False
        return _SENTINELS.findall(shown) == ["0"] and plain != shown

    def _template(self, messages: Sequence[Mapping[str, Any]], *, in_parts: bool, ask: bool) -> str:
        filled: Sequence[Mapping[str, Any]] = messages
        if not in_parts:
            token = getattr(self.inner, "image_token", None) or "<image>"
            filled = [
                {
                    "role": message["role"],
                    "content": "".join(
                        f"{token}\n" if part["type"] == "image" else part["text"]
                        for part in message["content"]
                    ),
                }
                for message in messages
            ]
        fill = getattr(self.inner, "apply_chat_template", self.tokenizer.apply_chat_template)
        try:
            return str(
                fill(
                    [dict(message) for message in filled], tokenize=False,
                    chat_template=_template_of(self.inner), add_generation_prompt=ask,
                )
            )  # fmt: skip
        except Exception as error:  # a template raises what its author has chosen
            raise DataError(
                f"the chat template cannot be filled in: {first_line(error)}"
            ) from error

    def _cut(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch without what is beyond the most tokens that the model reads."""
        rows, tokens = batch["input_ids"].shape
        limit = int(self.tokenizer.model_max_length)
        if tokens <= limit:
            return batch
        names = [n for n, v in batch.items() if v.ndim > 1 and v.shape[:2] == (rows, tokens)]
        image = getattr(self.inner, "image_token_id", None)
        lost = batch["input_ids"][:, limit:] == (-1 if image is None else image)
        kept = {name: batch[name][:, :limit] for name in names}
        empty = "labels" in kept and bool((kept["labels"] == IGNORED).all(dim=1).any())
        if "labels" not in batch or bool(lost.any()) or empty:
            raise DataError(
                f"a conversation takes {tokens:,} tokens with its images, and {limit:,} are the "
                "most (--max-length, or what the model reads); take smaller images "
                "(--max-pixels), or fewer"
            )
        return batch | kept


def _template_of(processor: Any) -> str | None:
    """The chat template of a processor that reads images, or of its tokenizer."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        return None
    for owner in (processor, tokenizer):
        found = getattr(owner, "chat_template", None)
        if isinstance(found, Mapping):  # several by name
            found = found.get("default", next(iter(found.values()), None))
        if found:
            return str(found)
    return None


def _capped(processor: Any, pixels: int) -> Any:
    """A copy that makes images of so many pixels at most, if it decides on their size at all."""
    own = most_pixels(processor.image_processor)
    if own is None or own <= pixels:
        return processor
    capped = copy.copy(processor)
    capped.image_processor = copy.copy(processor.image_processor)
    least = min(int(processor.image_processor.size["shortest_edge"]), pixels)
    capped.image_processor.size = {"shortest_edge": least, "longest_edge": pixels}
    return capped


def _lists(images: Any, samples: int) -> list[list[Image]]:
    if images is None:
        return [[] for _ in range(samples)]
    return [list(each) if isinstance(each, (list, tuple)) else [each] for each in images]


class _Recorder:
    """Stands for the tokenizer while a processor runs.

    The processor puts in the tokens of the images. Then the answers take the places of their
    sentinels, and it is known which characters, and with them which tokens, are theirs.
    """

    def __init__(self, tokenizer: Any, answers: Sequence[str], rows: int, side: str) -> None:
        self._tokenizer, self._answers, self.padding_side = tokenizer, answers, side
        self._rows = rows
        self._spans: list[list[tuple[int, int]]] = []
        self._offsets: Any = ()
        self._ids: Any = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: Any, *others: Any, **options: Any) -> Any:
        if not isinstance(text, list):
            return self._tokenizer(text, *others, **options)
        options = options | {"padding_side": self.padding_side}
        found = [self._filled(each) for each in text]
        filled = [said for said, _ in found]
        if not self._answers or len(text) != self._rows:
            return self._tokenizer(filled, *others, **options)
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self._tokenizer).__name__} does not say which token is which part of a "
                "text, so answers and questions cannot be told apart; save it with a tokenizer.json"
            )
        self._spans = [spans for _, spans in found]
        made = self._tokenizer(filled, *others, **options, return_offsets_mapping=True)
        self._offsets, self._ids = _listed(made.pop("offset_mapping")), _listed(made["input_ids"])
        return made

    def _filled(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """A text with the answers in their places, and which characters are theirs."""
        said, *rest = _SENTINELS.split(text)
        spans = []
        for number, piece in zip(rest[::2], rest[1::2], strict=True):
            answer = self._answers[int(number)]
            spans.append((len(said), len(said) + len(answer)))
            said += answer + piece
        return said, spans

    def labels(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, T]` int64: the ids of answers and of the special token after each, or `IGNORED`."""
        if len(self._ids) != len(ids):
            raise DataError("the processor did not tokenize the conversations as they are")
        labels = ids.new_full(ids.shape, IGNORED)
        special = set(self._tokenizer.all_special_ids)
        for row, (spans, offsets) in enumerate(zip(self._spans, self._offsets, strict=True)):
            own = []
            for first, last in spans:
                found = [n for n, (a, b) in enumerate(offsets) if a < last and b > first and b > a]
                end = found[-1] + 1 if found else len(offsets)
                # What ends the turn is to be learned as well: it directly follows.
                ends = end < len(offsets) and offsets[end][0] == last < offsets[end][1]
                if ends and self._ids[row][end] in special:
                    found.append(end)
                own += found
            place = self._place(ids[row].tolist(), row, own)
            labels[row, [place + n for n in own]] = ids[row, [place + n for n in own]]
        return labels

    def _place(self, ids: list[int], row: int, own: Sequence[int]) -> int:
        """Where in a row the tokenized text begins: some processors put image tokens first."""
        said = self._ids[row]
        for before in dict.fromkeys((len(ids) - len(said), 0)):
            if all(ids[before + n : before + n + 1] == [said[n]] for n in own):
                return before
        raise DataError("the processor did not tokenize the conversations as they are")


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _numbered(
    prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> tuple[list[str], list[str]]:
    """Prompts whose sentinels count the answers of the whole batch, and these answers."""
    numbered: list[str] = []
    known: list[str] = []
    for prompt, own in zip(prompts, answers, strict=True):
        start = len(known)
        pieces = _SENTINELS.split(prompt)
        for at in range(1, len(pieces), 2):
            pieces[at] = _SENTINEL.format(start + int(pieces[at]))
        numbered.append("".join(pieces))
        known += own
    return numbered, known
