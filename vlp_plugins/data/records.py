"""Records of captioned images: what every source gives, which columns are read, what is skipped."""

from __future__ import annotations

import logging
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

from PIL import Image, ImageOps

from vlp_plugins.data import conversations
from vlp_plugins.data.conversations import CHOICES, Asked, Conversation, choices_in, chosen
from vlp_plugins.runtime.errors import DataError, first_line, suggest
from vlp_plugins.runtime.parallel import ahead

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = (
    "text",
    "caption",
    "captions",
    "sentence",
    "sentences",
    "texts",
    "txt",
    "description",
    "raw",
    "alt_text",
)

SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
)
"""What folders of splits are called."""

Item = TypeVar("Item")
Said = str | Asked | Conversation
Pair = tuple[Image.Image | list[Image.Image], Said]

Captions = Literal["first", "all", "none", "labels", "conversations", "statements"]
"""Of an image with several captions: the first one makes the pair, or each makes a pair of its own.

`first` is for calibration: the same image several times in a batch says nothing new and spoils the
contrastive loss, whose negatives are the other pairs. `all` is for the evaluation of retrieval.
`none` reads no captions at all, for models of images only. `labels` gives the number of each
image's class in place of a caption. `conversations`, for chat models, reads whole conversations or
questions with their answers where the data has them, else the first caption.
`statements` are those of NLVR2, with two images each.
"""

_MAX_SKIPPED = 0.05
# A source of unknown length is given up after so many records, if too many of them were skipped.
_TRIAL = 200
_BUFFER = re.compile(r"\s*<_io\.\w+ object at 0x[0-9a-f]+>")


@dataclass(frozen=True, slots=True)
class Record:
    """One image with what its source says about it, not decoded yet.

    Attributes:
        image: reads and decodes the image, or all images of a conversation; any exception means
            that it cannot be used.
        caption: as the source holds it: text, a list of texts, or something else; or a function
            that reads it.
    """

    place: str
    image: Callable[[], Any]
    caption: object


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of the data of a task with what belongs to it, not decoded yet.

    Attributes:
        place: where it is, for messages.
        texts: captions, of which each makes a row of an epoch; or one question, or statement; or
            nothing. For the loss of a chat model also one conversation.
        answers: of all people that were asked the question; empty if the text is no question, or
            they are not published. One of the choices if there are any, also where the data has its
            letter or number.
        label: number of the class, from 0; of a statement 1 for true; None without classes.
        second: opens the other image of a statement about two; None for samples of one image.
        choices: of the question, for models that are shown them; empty for an open question.
    """

    place: str
    image: Callable[[], Image.Image]
    texts: tuple[Any, ...] = ("",)
    answers: tuple[str, ...] = ()
    label: int | None = None
    second: Callable[[], Image.Image] | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """The samples of one split.

    Attributes:
        items: in stored order.
        classes: names of the classes by their number; empty if unknown.
        answers: that models choose among; None if the data brings no list.
    """

    description: str
    items: Iterable[Sample]
    classes: tuple[str, ...] = ()
    answers: tuple[str, ...] | None = None


class CaptionSource(ABC):
    """Pairs of an RGB image and a caption, the same in every iteration.

    Images are turned upright by their EXIF orientation. Records whose image does not decode or
    whose caption is empty are skipped and counted.

    Attributes:
        description: what it reads, for messages and reports.
        length: number of pairs if none is skipped; None if unknown before the end.
        seen: records read in the latest iteration.
        skipped: of these.
    """

    def __init__(self, description: str, captions: Captions) -> None:
        self.description = description
        self.captions = captions
        self.length: int | None = None
        self.seen = self.skipped = 0
        self._first_skipped = ""
        self._is_whole = False

    @abstractmethod
    def records(self, seed: int | None) -> Iterator[Record]:
        """All records, in stored order or shuffled by `seed`."""

    def __iter__(self) -> Iterator[Pair]:
        return self.pairs()

    def pairs(self, seed: int | None = None, *, workers: int = 0) -> Iterator[Pair]:
        """All pairs, in stored order or shuffled by `seed` (same seed, same order).

        Args:
            seed: of the order; None for the stored one.
            workers: threads that decode images ahead; the pairs are the same for any number.

        Raises:
            DataError: if there is no pair, more than 5% of the records cannot be used, or the
                source breaks off.
        """
        self.seen = self.skipped = 0
        self._first_skipped = ""
        self._is_whole = False
        for record, found in ahead(self._decoded, self.records(seed), workers):
            self.seen += 1
            if isinstance(found, Exception):
                self._skip(record, found)
                continue
            image, captions = found
            for caption in captions if self.captions == "all" else captions[:1]:
                yield image, caption
        self._is_whole = True
        self.check()
        if self.skipped:
            logger.warning("%s", self._skipped_message())

    def _decoded(self, record: Record) -> tuple[Record, tuple[Any, list[Said]] | Exception]:
        """A record with its image and captions, or with why it is skipped."""
        try:
            captions: list[Said] = [""]
            if self.captions == "conversations":
                captions = [said_of(record)]
            elif self.captions == "labels":
                captions = [str(record.caption)]
            elif self.captions == "statements":
                captions = [cast("Said", record.caption)]
            elif self.captions != "none":
                captions = [*texts_of(record.caption)]
            return record, (upright(record.image()), captions)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            return record, error

    def check(self) -> None:
        """Checks what was read so far; called at the end, and by a caller that stops earlier.

        Before the end, skipped records are compared with all that there are (200 of an unknown
        number), so that a source does not fail because its few damaged records come first.

        Raises:
            DataError: if nothing was found, or more than 5% was skipped.
        """
        if not self.seen:
            raise DataError(f"{self.description} holds no captioned image")
        of = self.seen if self._is_whole else max(self.seen, self.length or _TRIAL)
        if self.skipped > _MAX_SKIPPED * of:
            raise DataError(
                f"{self._skipped_message()}; more than {_MAX_SKIPPED:.0%} is too many: "
                "repair or remove them"
            )

    def _skip(self, record: Record, error: Exception) -> None:
        self.skipped += 1
        # Pillow names what it was given, which is a buffer here; the place says more.
        reason = f"{record.place}: {_BUFFER.sub('', first_line(error))}"
        self._first_skipped = self._first_skipped or reason
        logger.info("skipped %s", reason)
        if self.length is not None:
            hopeless = self.skipped > _MAX_SKIPPED * self.length
        else:
            hopeless = self.seen >= _TRIAL and self.skipped > _MAX_SKIPPED * self.seen
        if hopeless:
            self.check()

    def _skipped_message(self) -> str:
        found = f"{self.skipped:,} of {self.seen:,} records read"
        if not self._is_whole and self.length is not None:  # given up, perhaps at its first record
            found = f"{self.skipped:,} of {self.length:,} records"
            found = f"at least {found}" if self.seen < self.length else found
        return f"{self.description}: {found} cannot be used (first: {self._first_skipped})"


class RecordList(CaptionSource):
    """A source whose records are known from the start."""

    def __init__(self, records: Sequence[Record], description: str, captions: Captions) -> None:
        super().__init__(description, captions)
        self._records = records
        self.length = sum(
            len(record.caption) if captions == "all" and isinstance(record.caption, list) else 1
            for record in records
        )

    def records(self, seed: int | None) -> Iterator[Record]:
        if seed is None:
            return iter(self._records)
        return iter(random.Random(seed).sample(self._records, len(self._records)))


def said_of(record: Record) -> Said:
    """What is said about the image of a record: a conversation, a question, or its first caption.

    Raises:
        ValueError: if it holds none.
    """
    if callable(record.caption):
        found: Said = record.caption()
        return found
    return texts_of(record.caption)[0]


def texts_of(caption: object) -> list[str]:
    """The captions in a value: text, a list of texts, or mappings such as `{"raw": text}`.

    Raises:
        ValueError: if it holds no text.
    """
    if isinstance(caption, str):
        texts = [caption.strip()]
    elif isinstance(caption, Mapping):
        named = next((caption[key] for key in ("raw", *CAPTION_COLUMNS) if key in caption), None)
        texts = texts_of(named)
    elif isinstance(caption, (list, tuple)):
        texts = [text for part in caption for text in texts_of(part)]
    elif caption is None:
        texts = []
    else:
        raise ValueError(f"its caption is {caption!r}, not text")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("its caption is empty")
    return texts


_ANSWERS = ("answer", "answers", "multiple_choice_answer")


def columns_said(
    columns: Iterable[str], asked: str | None, captions: Captions, *, where: str
) -> list[str]:
    """The columns of what is said: a conversation, a question and its answer, or a caption.

    Only for `conversations` it may be another than a caption; the column that the user `asked` for
    wins.

    Raises:
        DataError: if there is none.
    """
    columns = list(columns)
    if captions == "conversations" and asked is None:
        for name in conversations.COLUMNS:
            if name in columns:
                return [name]
        answer = next((name for name in _ANSWERS if name in columns), None)
        if "question" in columns and answer is not None:
            return ["question", answer, *([CHOICES] if CHOICES in columns else [])]
    return [choose_column(columns, asked, CAPTION_COLUMNS, kind="caption", where=where)]


def said_in(row: Mapping[str, Any], columns: Sequence[str], *, images: int) -> object:
    """The value of `columns_said` in a row as `Record.caption` holds it."""
    if len(columns) > 1:
        return partial(_asked, *(row.get(column) for column in columns))
    value = row.get(columns[0])
    if columns[0] in conversations.COLUMNS:
        return partial(Conversation.read, value, images=images)
    return value


def _asked(question: object, answers: object, listed: object = None) -> Asked:
    """A question with the answer that most people gave, the first of them if several."""
    (text,) = texts_of(question)[:1]
    choices = choices_in(listed)
    several = answers if isinstance(answers, (list, tuple)) else [answers]
    plain = [each.get("answer") if isinstance(each, Mapping) else each for each in several]
    said = texts_of([str(each) if isinstance(each, int) else each for each in plain])
    meant = tuple(chosen(each, choices) for each in said)
    return Asked(text, max(meant, key=meant.count), choices, meant)


def upright(opened: Any) -> Any:
    """An image, or each of several, as `upright_rgb` makes it."""
    return [*map(upright_rgb, opened)] if isinstance(opened, list) else upright_rgb(opened)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


def choose_column(
    columns: Iterable[str], asked: str | None, known: Sequence[str], *, kind: str, where: str
) -> str:
    """The column that the user named, else the first of the known names that is there (any case).

    Raises:
        DataError: if there is none; `kind` (`image`, `caption`) and `where` are for the message.
    """
    columns = list(columns)
    listed = ", ".join(columns) or "none"
    if asked is not None:
        if asked in columns:
            return asked
        hint = suggest(asked, columns) if columns else " (there are no columns)"
        raise DataError(f"{where} has no column {asked!r}{hint}")
    lowered = {column.lower(): column for column in reversed(columns)}
    for name in known:
        if name in lowered:
            return lowered[name]
    raise DataError(
        f"{where} has no {kind} column that we know (its columns: {listed}); "
        f"name it with {kind}_column (--{kind}-column)"
    )


def with_split(source: object, split: str | None) -> str:
    """`photos (train)`: what was read, for messages and reports."""
    return f"{source} ({split})" if split else str(source)


def choose_split(available: Sequence[str], wanted: str | None, *, where: str) -> str:
    """The split that is asked for; of None the only one, or `train`.

    Raises:
        DataError: if it is not there, or none was named among several without `train`.
    """
    if wanted is None:
        if len(available) == 1:
            return available[0]
        if "train" in available:
            return "train"
        raise DataError(
            f"{where} has the splits {', '.join(available)}; name one with split (--split)"
        )
    if wanted not in available:
        hint = suggest(wanted, list(available)) if available else " (it has no splits)"
        raise DataError(f"{where} has no split {wanted!r}{hint}")
    return wanted


def split_among(parts: Iterable[str], wanted: str | None, *, where: str) -> str | None:
    """`choose_split` among what names begin with: folders, or words of file names.

    Returns:
        None if no split is asked for and the parts are not splits, or a single one.
    """
    found = list(dict.fromkeys(parts))
    if wanted is None and (len(found) < 2 or not any(part.lower() in SPLITS for part in found)):
        return None
    return choose_split(found, wanted, where=where)


def buffered(stream: Iterable[Item], seed: int, size: int = 1000) -> Iterator[Item]:
    """Shuffles a stream: each item is drawn at random from a buffer of `size` items.

    Same seed and stream, same order; no global random state is touched.
    """
    rng = random.Random(seed)
    waiting: list[Item] = []
    for item in stream:
        if len(waiting) < size:
            waiting.append(item)
            continue
        place = rng.randrange(size)
        yield waiting[place]
        waiting[place] = item
    rng.shuffle(waiting)
    yield from waiting
