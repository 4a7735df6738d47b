"""The data of a comparison: the task, samples to measure on, and others to calibrate with."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlp_plugins.data.batches import ExampleBatches
from vlp_plugins.data.chat import ChatProcessor
from vlp_plugins.data.records import Sample
from vlp_plugins.jobs.preparation import Loaded
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.jobs.samples import TaskSamples, read_samples
from vlp_plugins.jobs.tasks import TASK_CLASSES, Task, TaskRequest, able_tasks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.errors import DataError, RecipeError, UnsupportedError, VlpError
from vlp_plugins.runtime.memory import usable_bytes
from vlp_plugins.tasks import LOSS


@dataclass(frozen=True)
class CompareRequest:
    """What is compared, and on which data.

    Calibration samples are drawn from `data`, so many `batches` for each seed. Measured is on
    `test`, or on the part of `data` that is not calibrated with; `test_split` is of the one or the
    other. No task takes the first that model and data can do, no methods those of `COMPARED` that
    the model can do. At most `limit` test images (or questions) count. The `seed` is that of the
    first set of calibration samples, and says which samples are measured on.
    """

    data: DataRecipe
    test: str | None = None
    test_split: str | None = None
    task: str | None = None
    methods: tuple[str, ...] = ()
    sparsity: tuple[Target, ...] = (0.5, 0.75)
    limit: int = 1000
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `RecipeError` if there is no data, before a model is loaded."""
        if self.data.source is None:
            raise RecipeError(
                "`vlp compare` calibrates and measures on data: give --data FOLDER (images with "
                "metadata.jsonl, or a folder of images for each class)"
            )


def open_data(loaded: Loaded, request: CompareRequest) -> tuple[Task, TaskSamples]:
    """The task with the samples that are measured on, and what calibration samples come from.

    Raises:
        DataError: if data is missing, or not enough.
        UnsupportedError: if the model can do none of the tasks on this data.
    """
    able = able_tasks(loaded.adapter, loaded.processor)
    order = ("classification", "retrieval", "vqa", "nlvr2")
    names = [request.task] if request.task else [*(each for each in order if each in able), LOSS]
    reasons = []
    for name in names:
        try:
            chat = isinstance(loaded.processor, ChatProcessor)
            test, pool = _samples(request, name, chat=chat)
            if request.task is None:  # the class of an adapter does not know what a model lacks
                two = replace(test, samples=test.samples[:2])
                task_of(loaded, request, name, two).measure(lambda batches: batches)
        except VlpError as error:
            if request.task is not None:
                raise
            reasons.append(f"{name}: {error}")
            continue
        return task_of(loaded, request, name, test), pool
    raise UnsupportedError(
        f"adapter {loaded.adapter.name!r} can do no task on {request.data.source}: "
        + "; ".join(reasons)
    )


def task_of(loaded: Loaded, request: CompareRequest, name: str, samples: TaskSamples) -> Task:
    """The task with these samples."""
    data = request.data
    asked = TaskRequest(
        name,
        str(request.test or data.source),
        batch_size=data.batch_size,
        image_column=data.image_column,
        caption_column=data.caption_column,
        workers=data.workers,
    )
    return TASK_CLASSES[name](loaded, asked, samples)


def _samples(request: CompareRequest, task: str, *, chat: bool) -> tuple[TaskSamples, TaskSamples]:
    """What is measured on, and what calibration samples are drawn from; never the same images."""
    data = request.data

    def read(source: str, split: str | None) -> TaskSamples:
        return read_samples(
            task, source, split=split, image_column=data.image_column,
            caption_column=data.caption_column, chat=chat,
        )  # fmt: skip

    source = str(data.source)
    pool = read(source, data.split)
    if request.test is None and request.test_split is None:
        return _divided(pool, request.limit, request.seed)
    other = request.test or source
    if Path(other).exists() and Path(source).exists() and Path(other).samefile(source):
        other = source  # by a link, or an absolute path
    test = read(other, request.test_split)
    if test.description == pool.description:
        raise RecipeError(
            f"{test.description} would be calibrated with and measured on; name another --test or "
            "--test-split, or leave both out: then the data is divided"
        )
    # At random, but in stored order: the first may all be of one class.
    every = range(len(test.samples))
    drawn = random.Random(f"vlp compare {request.seed}")
    numbers = sorted(drawn.sample(every, min(request.limit, len(every))))
    return replace(test, samples=tuple(test.samples[number] for number in numbers)), pool


def _divided(samples: TaskSamples, limit: int, seed: int) -> tuple[TaskSamples, TaskSamples]:
    """Two parts that share no image: the first has `limit` images, at most half of them."""
    by_image: dict[object, list[int]] = {}
    for number, sample in enumerate(samples.samples):
        by_image.setdefault(_image_of(sample, number), []).append(number)
    if len(by_image) < 2:
        raise DataError(
            f"{samples.description} has a single image; two are the least that can be divided into "
            "calibration and test: give --test FOLDER"
        )
    images = random.Random(f"vlp compare {seed}").sample(list(by_image), len(by_image))
    count = min(limit, len(images) // 2)
    parts = []
    for title, chosen in (("test", images[:count]), ("calibration", images[count:])):
        numbers = sorted(number for image in chosen for number in by_image[image])
        parts.append(
            replace(
                samples,
                description=f"{samples.description}, {title} part",
                samples=tuple(samples.samples[number] for number in numbers),
            )
        )
    return parts[0], parts[1]


def _image_of(sample: Sample, number: int) -> object:
    """What is the same for samples of one image: its file or its bytes."""
    arguments = getattr(sample.image, "args", ())
    image = arguments[-1] if arguments else None
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
        return number if image is None else image
    return image if isinstance(image, Path) else number


def in_memory(batches: Collection[Batch] | ExampleBatches) -> Collection[Batch] | ExampleBatches:
    """The batches as a list, if they take little memory: they are read for every cell."""
    first = next(iter(batches))
    size = sum(value.nbytes for value in first.values() if torch.is_tensor(value))
    if len(batches) * size * 4 > usable_bytes(torch.device("cpu"), 0):
        return batches
    return list(batches)
