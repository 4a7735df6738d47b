"""Tasks: their data, read once, and a model measured on it as often as asked; `evaluate`."""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import nn

from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.data.batches import Example, ExampleBatches
from vlp_plugins.data.chat import CHOICE_PROMPT, ChatProcessor
from vlp_plugins.data.conversations import Asked, chosen
from vlp_plugins.data.labelled import class_numbers
from vlp_plugins.data.processors import Processor
from vlp_plugins.data.sources import checked_source
from vlp_plugins.jobs.metrics import TaskMetrics
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.jobs.samples import TaskSamples, read_samples
from vlp_plugins.loading import processor_for
from vlp_plugins.methods.resolve import resolve_adapter
from vlp_plugins.models.adapter import (
    Adapter,
    AnsweringAdapter,
    Batch,
    CaptioningAdapter,
    ClassifyingAdapter,
    RetrievalAdapter,
    StatementAdapter,
)
from vlp_plugins.models.request import checked_arguments
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, RecipeError, UnsupportedError, suggest
from vlp_plugins.runtime.model_state import buffers_kept, neutral_state, takes_model
from vlp_plugins.tasks import LOSS, MEASURED
from vlp_plugins.tasks.captioning import caption_scores, write_captions
from vlp_plugins.tasks.classification import (
    classification,
    classifies,
    statement_accuracy,
    zero_shot,
)
from vlp_plugins.tasks.retrieval import retrieval
from vlp_plugins.tasks.vqa import answer_questions, vqa_accuracy


@dataclass(frozen=True)
class TaskRequest:
    """What is measured, on which data, and how; see `evaluate`."""

    task: str | None
    data: str
    split: str | None = None
    limit: int | None = None
    batch_size: int = 32
    image_column: str | None = None
    caption_column: str | None = None
    rerank: int = 0
    beams: int | None = None
    longest: int | None = None
    answers: Path | None = None
    written: bool = False
    prompt: str | None = None
    workers: int | None = None

    def check(self) -> None:
        """Makes sure that every option concerns the task.

        Raises:
            RecipeError: naming the first option that does not, or that makes no sense.
        """
        if self.task is not None and self.task not in MEASURED:
            raise RecipeError(f"no task is called {self.task!r}{suggest(self.task, [*MEASURED])}")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, not {value}")
        if self.written and self.answers is not None:
            raise RecipeError(
                "--written (the model writes its answers) and --answers (it chooses among them) "
                "contradict each other; give one of them"
            )
        for name, tasks in _OF_TASKS.items():
            strange = self.task is not None and self.task not in tasks
            if strange and getattr(self, name) != _DEFAULTS[name]:
                raise RecipeError(
                    f"{name} (--{name.replace('_', '-')}) is of {' and '.join(tasks)}, not of "
                    f"{self.task}; leave it out"
                )


_log = logging.getLogger(__name__)

CLASS_PROMPT = "a photo of a {}"
_WRITING = ("captioning", "vqa")
_OF_TASKS = {
    "rerank": ("retrieval",),
    "beams": _WRITING,
    "longest": _WRITING,
    "answers": ("vqa",),
    "written": ("vqa",),
    "caption_column": ("retrieval", "captioning", LOSS),
}
_DEFAULTS = {one.name: one.default for one in fields(TaskRequest)}


Track = Callable[[Iterable[Batch]], Iterable[Batch]]
"""Wraps the batches of a pass, to show how far it is."""


class Tracker:
    """Reports how many batches of all passes are done."""

    def __init__(self, progress: Progress | None, passes: int) -> None:
        self._progress, self._passes, self._done = progress, passes, 0

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        total = self._passes * len(batches)  # type: ignore[arg-type]
        for batch in batches:
            yield batch
            self._done += 1
            if self._progress is not None:
                self._progress(min(self._done, total), total)


class Task(ABC):
    """Data of a task, read for one model and its pruned version.

    Attributes:
        name: one of `MEASURED`.
        score: the metrics whose mean ranks models.
        lower_is_better: whether a lower score is the better one.
    """

    name: ClassVar[str]
    score: ClassVar[tuple[str, ...]]
    lower_is_better: ClassVar[bool] = False
    batches: Collection[Batch] | ExampleBatches

    def __init__(
        self, loaded: Loaded, request: TaskRequest, data: TaskSamples | None = None
    ) -> None:
        """Opens the data of the request, or takes samples; images are decoded when they are needed.

        Raises:
            DataError: if it is not there or not of this kind.
        """
        self.loaded, self.request = loaded, request
        self.data = self.read() if data is None else data
        if data is None and request.split is None and self.data.description.endswith("(train)"):
            _log.warning(
                "measured on %s; --split takes another part of the data",
                self.data.description,
            )
        self.batches = self._batches_of(self.examples())

    @property
    def chat(self) -> ChatProcessor | None:
        """The processor of a chat model; None for other models."""
        found = self.loaded.processor
        return found if isinstance(found, ChatProcessor) else None

    def calibration(self) -> Collection[Batch] | ExampleBatches:
        """The same samples as the model's loss reads them: a chat model with the answers."""
        answered = self.answered()
        return self.batches if answered is None else self._batches_of(answered)

    def _batches_of(self, examples: list[Example]) -> ExampleBatches:
        loaded = self.loaded
        size, workers = self.request.batch_size, self.request.workers
        return ExampleBatches(examples, loaded.processor, loaded.adapter, size, workers)

    def read(self) -> TaskSamples:
        """The data of the request."""
        names = ("task", "data", "split", "limit", "image_column", "caption_column")
        asked = {name: getattr(self.request, name) for name in names}
        return read_samples(**asked, chat=self.chat is not None)

    @property
    def truth(self) -> list[tuple[str, Sequence[str]]]:
        """Of every example, where it is and what people wrote; empty if models write nothing."""
        return []

    @abstractmethod
    def examples(self) -> list[Example]:
        """The rows of the batches."""

    def answered(self) -> list[Example] | None:
        """The same rows with what the model is to say, where that is another thing."""
        return None

    def check_prompts(self) -> None:
        """Raises `UnsupportedError` for a model whose prompts nothing is known of."""
        adapter = self.loaded.adapter
        if self.chat is None and adapter.general:
            raise UnsupportedError(
                f"adapter {adapter.name!r} does not say what a {type(self.loaded.model).__name__} "
                "is asked with; measure --task loss, or a chat model"
            )

    def search(self, longest: int, longest_chat: int) -> tuple[int, int]:
        """Most tokens and beams of a text that is written."""
        length = longest if self.chat is None else longest_chat
        beams = 3 if self.chat is None else 1
        return self.request.longest or length, self.request.beams or beams

    @abstractmethod
    def measure(self, track: Track) -> TaskMetrics:
        """Measures the model as it is now."""

    def settings(self) -> dict[str, Any]:
        """What else than model and data decides the figures."""
        return {}


def _prompted(prompt: str | None) -> dict[str, str]:
    return {} if prompt is None else {"prompt": " ".join(prompt.split())}


class RetrievalTask(Task):
    """Every image with each of its captions."""

    name = "retrieval"
    score = ("image_to_text_r1", "text_to_image_r1")

    def examples(self) -> list[Example]:
        samples = self.data.samples
        self._images = [number for number, each in enumerate(samples) for _ in each.texts]
        return [Example(each.place, each.image, text) for each in samples for text in each.texts]

    def measure(self, track: Track) -> TaskMetrics:
        found = retrieval(
            self.loaded.model, self.loaded.adapter, track(self.batches),
            rerank=self.request.rerank or None, image_ids=self._images,
        )  # fmt: skip
        values = found.final.by_image(self._images)
        return TaskMetrics(found.as_dict(), by_sample=dict(zip(self.score, values, strict=True)))

    def settings(self) -> dict[str, Any]:
        return {
            "rerank": self.request.rerank,
            "images": self._images[-1] + 1,
            "texts": len(self._images),
        }


class CaptioningTask(Task):
    """Every image once; its captions are the references."""

    name = "captioning"
    score = ("cider",)

    @property
    def truth(self) -> list[tuple[str, Sequence[str]]]:
        return [(each.place, each.texts) for each in self.data.samples]

    def examples(self) -> list[Example]:
        self.check_prompts()
        asked = None if self.chat is None else self.chat.caption(None)
        return [Example(s.place, s.image, asked or s.texts[0]) for s in self.data.samples]

    def answered(self) -> list[Example]:
        return [Example(s.place, s.image, s.texts[0]) for s in self.data.samples]

    def measure(self, track: Track) -> TaskMetrics:
        length, beams = self.search(30, 64)
        texts = write_captions(
            self.loaded.model, self.loaded.adapter, track(self.batches), self.loaded.processor,
            max_length=length, num_beams=beams,
        )  # fmt: skip
        found = caption_scores(texts, [each.texts for each in self.data.samples])
        self._words = found.words
        by_sample = {"cider": found.cider_by_image}
        return TaskMetrics(found.scores, found.absent, texts, by_sample=by_sample)

    def settings(self) -> dict[str, Any]:
        length, beams = self.search(30, 64)
        return {
            "images": len(self.data.samples),
            "beams": beams,
            "longest": length,
            "words": self._words,
            **_prompted(None if self.chat is None else self.chat.caption_prompt),
        }


class VqaTask(Task):
    """Every question once."""

    name = "vqa"
    score = ("accuracy",)

    @property
    def truth(self) -> list[tuple[str, Sequence[str]]]:
        return [(each.place, each.answers) for each in self.data.samples]

    def examples(self) -> list[Example]:
        self.check_prompts()
        chat = self.chat is not None
        self._answers = None if self.request.written or chat else self.data.answers
        if self.request.answers is not None:
            self._answers = _read_answers(self.request.answers)
        return [
            Example(s.place, s.image, Asked(s.texts[0], None, s.choices) if chat else s.texts[0])
            for s in self.data.samples
        ]

    def answered(self) -> list[Example] | None:
        if self.chat is None:
            return None
        return [
            Example(
                s.place,
                s.image,
                Asked(s.texts[0], max(s.answers, key=s.answers.count), s.choices),
            )
            for s in self.data.samples
        ]

    def measure(self, track: Track) -> TaskMetrics:
        length, beams = self.search(10, 16)
        texts = answer_questions(
            self.loaded.model, self.loaded.adapter, track(self.batches), self.loaded.processor,
            answers=self._answers, max_length=length, num_beams=beams,
        )  # fmt: skip
        samples = self.data.samples
        meant = [chosen(text, each.choices) for text, each in zip(texts, samples, strict=True)]
        found = vqa_accuracy(meant, [each.answers for each in samples])
        by_sample = {"accuracy": found.by_question}
        return TaskMetrics({"accuracy": found.accuracy}, texts=texts, by_sample=by_sample)

    def settings(self) -> dict[str, Any]:
        how: dict[str, Any] = {"questions": len(self.data.samples)}
        if self._answers is not None:
            return how | {"answers to choose among": len(self._answers)}
        length, beams = self.search(10, 16)
        prompt = None if self.chat is None else self.chat.question_prompt
        if any(sample.choices for sample in self.data.samples):
            prompt = None if self.chat is None else self.chat.prompt or CHOICE_PROMPT
        return how | {"beams": beams, "longest": length, **_prompted(prompt)}


class ClassificationTask(Task):
    """Every image with its class; where model and data name theirs, names decide.

    A model of two towers without a classifier takes the class whose prompt is nearest (zero-shot).
    """

    name = "classification"
    score = ("top1",)
    _prompts: ExampleBatches | None = None

    def examples(self) -> list[Example]:
        numbers = class_numbers(self.loaded.model, self.data.classes)
        return [
            Example(
                s.place, s.image, label=None if s.label is None else numbers.get(s.label, s.label)
            )
            for s in self.data.samples
        ]

    def measure(self, track: Track) -> TaskMetrics:
        loaded = self.loaded
        if self._prompts is None and not classifies(loaded.model, loaded.adapter, self.batches):
            blank = Image.new("RGB", (64, 64)).copy  # the image of a prompt is not read
            texts = self._prompt_texts()
            self._prompts = self._batches_of([Example("", blank, text) for text in texts])
        if self._prompts is None:
            found = classification(loaded.model, loaded.adapter, track(self.batches))
        else:
            batches = track(self.batches)
            found = zero_shot(loaded.model, loaded.adapter, batches, self._prompts)
        by_sample = {"top1": [100.0 * (ahead < 1) for ahead in found.ahead]}
        return TaskMetrics({f"top{k}": v for k, v in found.top.items()}, by_sample=by_sample)

    def answered(self) -> list[Example] | None:
        """Without a classifier with the prompt of the class, as the loss needs one."""
        if classifies(self.loaded.model, self.loaded.adapter, self.batches):
            return None
        prompts = self._prompt_texts()
        return [
            Example(s.place, s.image, "" if s.label is None else prompts[s.label])
            for s in self.data.samples
        ]

    def _prompt_texts(self) -> list[str]:
        """By number the prompt of each class."""
        if not self.data.classes:
            raise DataError(
                f"{self.data.description} does not name its classes, and a model without a "
                "classifier tells images apart by their names; take a folder for each class"
            )
        names = (name.replace("_", " ") for name in self.data.classes)
        return [self._prompt.replace("{}", name) for name in names]

    @property
    def _prompt(self) -> str:
        return CLASS_PROMPT if self.request.prompt is None else self.request.prompt

    def settings(self) -> dict[str, Any]:
        prompted = {} if self._prompts is None else {"prompt": self._prompt}
        return {"images": len(self.data.samples), **prompted}


class LossTask(Task):
    """The model's own loss on images with their first captions, or on answers, batch by batch."""

    name = LOSS
    score = ("loss",)
    lower_is_better = True

    def examples(self) -> list[Example]:
        """Whole batches, as the contrastive loss depends on their size; of a chat model all."""
        samples, size = self.data.samples, self.request.batch_size
        whole = len(samples) // size * size or len(samples)
        if self.chat is not None:
            whole = len(samples)
        return [Example(s.place, s.image, s.texts[0], s.label) for s in samples[:whole]]

    def measure(self, track: Track) -> TaskMetrics:
        loaded = self.loaded
        with LossProbe(loaded.model, loaded.adapter, loaded.weights).attached(()) as probe:
            losses = [probe.loss(batch, i) for i, batch in enumerate(track(self.batches))]
        return TaskMetrics({"loss": sum(losses) / len(losses)}, by_sample={"loss": losses})

    def settings(self) -> dict[str, Any]:
        return {"images": len(self.examples()), "batches": len(self.batches)}


class Nlvr2Task(Task):
    """Every statement about two images once."""

    name = "nlvr2"
    score = ("accuracy",)

    def examples(self) -> list[Example]:
        return [Example(s.place, s.image, s.texts[0], s.label, s.second) for s in self.data.samples]

    def measure(self, track: Track) -> TaskMetrics:
        right = statement_accuracy(self.loaded.model, self.loaded.adapter, track(self.batches))
        by_sample = {"accuracy": right}
        return TaskMetrics({"accuracy": sum(right) / len(right)}, by_sample=by_sample)

    def settings(self) -> dict[str, Any]:
        return {"statements": len(self.data.samples)}


_TASKS = (RetrievalTask, CaptioningTask, VqaTask, ClassificationTask, Nlvr2Task, LossTask)
TASK_CLASSES: dict[str, type[Task]] = {each.name: each for each in _TASKS}


_ABILITIES: dict[str, type] = {
    "retrieval": RetrievalAdapter,
    "captioning": CaptioningAdapter,
    "vqa": AnsweringAdapter,
    "classification": ClassifyingAdapter,
    "nlvr2": StatementAdapter,
}


def able_tasks(adapter: Adapter, processor: Processor | None = None) -> list[str]:
    """The tasks that models of a family can be measured on, with the processor of a chat model."""
    chat = _WRITING if isinstance(processor, ChatProcessor) else ()
    return [
        task for task, ability in _ABILITIES.items() if task in chat or isinstance(adapter, ability)
    ]


@checked_arguments
@neutral_state()
@takes_model
def evaluate(
    model: nn.Module,
    data: str | os.PathLike[str],
    *,
    task: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    rerank: int = 0,
    beams: int | None = None,
    longest: int | None = None,
    answers: str | os.PathLike[str] | None = None,
    written: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    max_pixels: int | None = None,
    workers: int | None = None,
    processor: Processor | str | os.PathLike[str] | None = None,
    adapter: Adapter | str | None = None,
    progress: Progress | None = None,
) -> TaskMetrics:
    """Measures a model on a task, as `vlp evaluate` does. The model is left as it is.

    Example:
        found = vlp.evaluate(model, "photos-test", task="retrieval")
        print(found)
        print(found["image_to_text_r1"])

    Args:
        model: as it is now: pruned, if masks were applied to it.
        data: for `retrieval` and `captioning` captioned images, see `batches`; for `vqa` VQAv2 or
            images with questions in `metadata.jsonl`; for `classification` CIFAR (binary),
            Flowers-102, one folder per class, or a data set with labels; for `nlvr2` NLVR2.
            `loss`, the model's own, is measured on captioned images, and that of a chat model on
            the answers of any data that `batches` reads.
        task: one of these six; None takes the only one but `loss` that model and data allow.
        split: of the data; None takes the only one, or `train`.
        limit: images (questions, statements) to measure on, the first ones; None takes all.
        batch_size: rows of a batch.
        rerank: of `retrieval`: how many candidates of each query the matching head puts in order,
            whose figures are then returned with those of the features; 0: features alone.
        beams: of `captioning` and of `vqa`: beams of the search for a text; None: 3, and 1 for
            chat models.
        longest: of the same: most tokens of a text that is written; None: 30, for answers 10; of
            chat models 64 and 16.
        answers: of `vqa`: file of the answers to choose among; None takes those of the data.
        written: of `vqa`: answers are written even if there is a list to choose from.
        image_column: of captioned images; None finds it.
        caption_column: of captioned images; None finds it.
        max_length: see `batches`, as are `prompt`, `max_pixels`, `processor` and `adapter`.
        prompt: of chat models. Of `classification` without a classifier the text of a class, in
            which `{}` is its name; None: "a photo of a {}".
        max_pixels: of chat models.
        workers: see `batches`.
        processor: see `batches`.
        adapter: see `prune`.
        progress: called with (batches done, batches in all).

    Returns:
        The metrics by name, all of them times 100; captions and answers are in `texts`.

    Raises:
        DataError: if there is no such data, it is not of the task, or no processor is found.
        RecipeError: for an option that is not one of the task, or if several tasks are possible.
        UnsupportedError: if models of this family do not do the task.
    """
    adapter = resolve_adapter(model, adapter)
    source = checked_source(data)
    found = processor_for(model, adapter, processor, max_length=max_length, max_pixels=max_pixels)
    request = TaskRequest(
        task,
        source,
        split=split,
        limit=limit,
        batch_size=batch_size,
        image_column=image_column,
        caption_column=caption_column,
        rerank=rerank,
        beams=beams,
        longest=longest,
        answers=None if answers is None else Path(answers),
        written=written,
        prompt=prompt,
        workers=workers,
    )
    request.check()
    weights = WeightMap.of(model, adapter)
    weights.check_finite()
    origin = ModelSource(str(getattr(model, "name_or_path", "")))
    with buffers_kept(model):
        measured = open_task(Loaded(origin, model, adapter, weights, found), request)
        figures = measured.measure(Tracker(progress, passes=1))
    return replace(figures, title=f"{measured.name} on {measured.data.description}")


def open_task(loaded: Loaded, request: TaskRequest) -> Task:
    """The task of a request, or without one the only one that model and data allow.

    Raises:
        VlpError: if there is no such data, it is not of the task, the model cannot do it, an option
            is not one of it, or not one task alone is possible.
    """
    task = request.task or _only_task(loaded, request)
    request = replace(request, task=task)
    request.check()
    if request.prompt is not None and task != "classification":
        model, adapter, processor = loaded.model, loaded.adapter, loaded.processor
        processor = processor_for(model, adapter, processor, prompt=request.prompt)
        loaded = replace(loaded, processor=processor)
    return TASK_CLASSES[task](loaded, request)


def _only_task(loaded: Loaded, request: TaskRequest) -> str:
    """The task that both a model and data are made for."""
    possible: dict[str, TaskSamples] = {}
    reasons: dict[str, str] = {}
    for name in able_tasks(loaded.adapter, loaded.processor):
        try:
            possible[name] = read_samples(
                name, request.data, split=request.split, limit=2,
                image_column=request.image_column, caption_column=request.caption_column,
            )  # fmt: skip
        except DataError as error:
            reasons[name] = str(error)
    if len(possible) > 1:  # the class of an adapter does not know what a model lacks
        for name, samples in list(possible.items()):
            asked = replace(request, task=name, rerank=0)
            try:
                TASK_CLASSES[name](loaded, asked, samples).measure(lambda batches: batches)
            except UnsupportedError:
                del possible[name]
    if len(possible) == 1:
        return next(iter(possible))
    if possible:
        raise RecipeError(
            f"several tasks can be measured on {request.data}; pass task (--task): "
            + " or ".join(possible)
        )
    if len(set(reasons.values())) == 1:
        raise DataError(next(iter(reasons.values())))
    raise RecipeError(
        f"{request.data} does not look like data of any task that models of adapter "
        f"{loaded.adapter.name!r} do" + "".join(f"; {name}: {why}" for name, why in reasons.items())
    )


def _read_answers(path: Path) -> tuple[str, ...]:
    """Answers to choose among: a JSON list, or one a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the answers in {path}: {error}") from error
    found: Any
    try:
        found = json.loads(text)
    except ValueError:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
        raise DataError(f"{path} should hold answers, as a JSON list of texts or one a line")
    return tuple(found)
