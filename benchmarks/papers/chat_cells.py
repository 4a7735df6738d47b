"""The cells of table chat: a chat model pruned in both walks, on tokens of one kind and others.

Every cell prunes the demo's LLaVA with the calibration samples of its seed, half of them captions
and half questions, without fine-tuning, and measures it on two splits: `dev` chooses the
composition, `test` is what the page shows. Table pretraining has such cells of other models.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.demo import MODELS, captions, chat
from benchmarks.demo.build_data import build
from benchmarks.demo.conversations import BRIEFLY, CAPTION_PROMPTS, KINDS, Turn, ask
from benchmarks.demo.samples import Sample, unseen_sample, validation_sample
from benchmarks.demo.scenes import CHAT_OBJECTS
from benchmarks.papers import kept
from benchmarks.papers.ways import Way
from vlp_plugins.data.chat import IGNORED
from vlp_plugins.loading import batches
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.runtime.files import atomic_folder, write_text

SEEDS = (1, 2, 3)
PATTERN = "keep=2,of=4"
SPARSITIES = (0.7, PATTERN, 0.6, 0.5)
"""In the order in which they are run."""
ONE = 0.7
POOL = 1024
"""Calibration scenes of each kind; a seed draws its own from them."""
SAMPLES, BATCH = 256, 16
QUESTIONS, CAPTIONS = 300, 200
"""Scenes of a split: one question about each, captions of the first ones."""
VERSION = 1
"""Of model, data and defaults of methods; to be raised when one changes."""
NO_DATA = ("omp", "lamp")
"""Methods that read none: one cell stands for all seeds."""


def way_of(
    method: str, allocation: str = "", walk: str = "", tokens: str = "", *, batch_size: int = BATCH
) -> Way:
    """A way that is named for what it is made of."""
    options = {"allocation": allocation, "walk": walk, "tokens": tokens}
    given = {key: value for key, value in options.items() if value}
    name = "-".join((method, *given.values()))
    return Way(name, method, options=given, batch_size=batch_size, samples=SAMPLES)


WALKING = (
    *(("wanda", ""), ("multiflow", ""), ("sparsegpt", ""), ("alps", ""), ("alps+", "")),
    *(("refit", ""), ("wanda", "owl"), ("alps", "owl")),
)
WAYS = (
    way_of("lamp"),
    *(way_of(method, budget, walk) for method, budget in WALKING for walk in ("model", "blocks")),
    *(way_of("atv"), way_of("tamp"), way_of("alps", walk="blocks", tokens="atv")),
    *(way_of("chita", walk=walk) for walk in ("model", "blocks")),
)
AT_ONE = (
    *(
        way_of(method, walk="blocks", tokens=tokens)
        for method in ("wanda", "alps")
        for tokens in ("text", "image")
    ),
    *(way_of("wanda", walk="blocks", tokens="amia"), way_of("wanda", "das", "blocks")),
    way_of("alps", "das", "blocks"),
)
"""What is run at one sparsity: tokens of one kind, and the two parts of TAMP."""


@dataclass(frozen=True)
class Questions:
    """Scenes of a split, and a question about each, the kinds in turn."""

    sample: Sample
    seed: int = 0

    def measure(self, model: Any, tokenizer: Any) -> dict[str, list[float]]:
        """By name a value for each scene: right (1) or wrong, and nats per token."""
        images, facts = self.sample.images, self.sample.facts
        rng = np.random.default_rng(self.seed)
        asked = [ask(KINDS[i % len(KINDS)], sorted(f), rng) for i, f in enumerate(facts)]
        texts = [question.text + BRIEFLY for question in asked]
        prompts = [CAPTION_PROMPTS[0]] * min(CAPTIONS, len(facts))
        said = chat.reply(
            model, tokenizer, images[: len(prompts)], prompts, longest=chat.CAPTION_TOKENS
        )
        answers = chat.reply(model, tokenizer, images, texts, longest=chat.ANSWER_TOKENS)
        wordings = [question.answers[rng.integers(len(question.answers))] for question in asked]
        turns = list(map(Turn, texts, wordings))
        return {
            "captions": [
                int(captions.is_fully_right(*each)) for each in zip(said, facts, strict=False)
            ],
            "answers": [int(q.is_right(a)) for q, a in zip(asked, answers, strict=True)],
            "losses": answer_losses(model, tokenizer, self.sample, turns),
        }


@torch.inference_mode()
def answer_losses(model: Any, tokenizer: Any, sample: Sample, turns: list[Turn]) -> list[float]:
    """Cross-entropy of the answer about each scene, in nats per token of it."""
    ids, mask, labels = chat.encode(tokenizer, [[turn] for turn in turns])
    seen = chat.look(model, sample.images)
    logits = model(
        input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": seen}
    ).logits.float()
    target = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), target, ignore_index=IGNORED, reduction="none"
    )
    means = losses.sum(1) / (target != IGNORED).sum(1)
    return [round(float(loss), 3) for loss in means]


@dataclass(frozen=True)
class Bench:
    """The model, the folder of its calibration data, and what it is measured on."""

    model: Any
    tokenizer: Any
    data: Path
    splits: Mapping[str, Questions]

    @classmethod
    def of(cls, world: Path, model: str = "chat") -> Bench:
        """Makes the data in a folder if it is not there yet."""
        data = world.absolute() / f"chat-{VERSION}"
        if not data.exists():
            with atomic_folder(data) as target:
                build(target, calibration=POOL, downstream=0, test=0, chat=True)
        splits = {
            "dev": Questions(validation_sample(QUESTIONS, CHAT_OBJECTS)),
            "test": Questions(unseen_sample(QUESTIONS, CHAT_OBJECTS)),
        }
        return cls(*chat.load(MODELS / model), data, splits)

    def measure(self) -> dict[str, dict[str, list[float]]]:
        """By split and name what the model does with each scene, as it is now."""
        return {
            split: questions.measure(self.model, self.tokenizer)
            for split, questions in self.splits.items()
        }

    def batches(self, way: Way, seed: int) -> list[Batch]:
        """Captions, then questions about other scenes."""
        count = way.samples // way.batch_size // 2
        parts = (("calibration", seed), ("calibration-questions", 100 + seed))
        return [
            batch
            for name, drawn in parts
            for batch in batches(
                self.data / name, self.model, batch_size=way.batch_size, count=count, seed=drawn
            )
        ]


class Measurable(Protocol):
    """A model with the data to prune it and what it is measured on."""

    @property
    def model(self) -> Any: ...

    def batches(self, way: Way, seed: int) -> list[Batch]: ...

    def measure(self) -> dict[str, dict[str, list[float]]]: ...


@dataclass(frozen=True)
class Cell:
    """One way, sparsity (or pattern) and seed; without a way the dense model."""

    way: Way | None
    sparsity: float | str = 0.0
    seed: int = SEEDS[0]
    model: str = "chat"

    @property
    def folder(self) -> str:
        """Of the files of its model, below that of all cells."""
        return "chat"

    @property
    def measured(self) -> list[int]:
        """How much of a split is measured."""
        return [QUESTIONS, CAPTIONS]

    @property
    def name(self) -> str:
        """Short and unique."""
        if self.way is None:
            return f"{self.folder}/dense"
        where = "2of4" if self.sparsity == PATTERN else f"{self.sparsity:g}"
        return f"{self.folder}/{self.way.name}-{where}-seed{self.seed}"

    def identity(self) -> dict[str, Any]:
        """What decides its figures."""
        return {
            "pruning": self.way and self.way.as_dict(),
            "sparsity": self.sparsity,
            "seed": self.seed,
            "pool": POOL,
            "measured": self.measured,
            "version": VERSION,
        }

    def content(self, out: Path) -> dict[str, Any] | None:
        """What its file says; None if there is none.

        Raises:
            OutputError: if the file was made with other settings, or is no JSON.
        """
        return kept.read(out / f"{self.name}.json", self.identity())

    def run(self, bench: Measurable, out: Path) -> None:
        """Prunes, measures, and writes the file whole or not at all.

        What a method says it cannot do is kept as well: under `refused`, instead of figures.
        """
        try:
            content = self._figures(bench)
        except (UnsupportedError, SparsityError) as error:
            content = {"refused": str(error)}
        path = out / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.identity(), **content}, separators=(",", ":"))
        write_text(path, text + "\n", overwrite=True)

    def _figures(self, bench: Measurable) -> dict[str, Any]:
        begin = time.process_time()
        masks = None
        if self.way is not None:
            options: dict[str, Any] = {"sparsity": self.sparsity, **self.way.options}
            if self.sparsity == PATTERN:
                options |= {"sparsity": None, "allocation": PATTERN}
            masks = prune(
                bench.model,
                bench.batches(self.way, self.seed),
                method=self.way.method,
                seed=self.seed,
                **options,
            )
        middle = time.process_time()
        with restored(WeightMap.of(bench.model, registry().adapter_for(bench.model))):
            if masks is not None:
                masks.apply(bench.model)
            found = bench.measure()
        return {
            "removed": masks and round(masks.counts().all.sparsity, 4),
            "cpu_seconds": {
                "pruning": round(middle - begin, 1),
                "measuring": round(time.process_time() - middle, 1),
            },
            # Choosing takes means; errors of differences take the single samples of the test.
            "dev": {name: round(float(np.mean(each)), 4) for name, each in found["dev"].items()},
            "test": found["test"],
        }


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, in the order in which they are run: all of the first seed come first."""
    pruned = [
        Cell(way, sparsity, seed)
        for sparsity in SPARSITIES
        for seed in seeds
        for way in (*WAYS, *(AT_ONE if sparsity == ONE else ()))
        if not (sparsity == PATTERN and "owl" in way.name)  # a pattern leaves no budgets
        if not (way.name in NO_DATA and seed != seeds[0])
    ]
    return [Cell(None), *sorted(pruned, key=lambda cell: cell.seed != seeds[0])]
