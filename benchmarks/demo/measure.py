"""What a demo model can do: retrieval among unseen pairs, and captions that are fully right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.demo.captions import Fact, is_fully_right
from benchmarks.demo.processors import MAX_TOKENS
from benchmarks.demo.samples import read_folder
from vlp_plugins.loading import batches, load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.tasks.captioning import write_captions
from vlp_plugins.tasks.retrieval import retrieval

CALIBRATION_BATCH = 32
BATCH_SIZE = 100


@dataclass(frozen=True)
class Figures:
    """What was measured, in per cent.

    Attributes:
        image_to_text: images whose own caption ranks first, R@1.
        text_to_image: captions whose own image ranks first, R@1.
        captions: written captions that name exactly the objects of the scene; None if models of
            the family write none.
    """

    image_to_text: float
    text_to_image: float
    captions: float | None

    @property
    def recall(self) -> float:
        """Mean of the two R@1."""
        return (self.image_to_text + self.text_to_image) / 2

    def as_dict(self) -> dict[str, float | None]:
        """By name, for JSON; two digits."""
        return {name: v if v is None else round(v, 2) for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Pairs:
    """Test pairs as a model takes them, made once for many measurements.

    Attributes:
        batches: what `Adapter.collate` gives.
        facts: what each scene shows, in the order of the batches.
        tokenizer: reads the captions that a model writes.
    """

    batches: list[Batch]
    facts: list[frozenset[Fact]]
    tokenizer: Any

    @classmethod
    def read(cls, folder: Path, model: nn.Module) -> Pairs:
        """Reads an image folder that `build_data` wrote.

        Args:
            folder: with `metadata.jsonl`.
            model: whose processor makes the batches.

        Raises:
            DataError: if the folder cannot be read.
            ValueError: if a caption's truth cannot be checked.
        """
        found = batches(folder, model, batch_size=BATCH_SIZE)
        return cls(list(found), read_folder(folder).facts, found.processor)


def measure(model: nn.Module, adapter: Adapter, pairs: Pairs) -> Figures:
    """Retrieval by features among all pairs, and greedy captions of models that write them.

    Args:
        model: a demo model; left as it is.
        adapter: the model's.
        pairs: the pairs to tell apart and to describe.
    """
    recall = retrieval(model, adapter, pairs.batches, ks=(1,)).final
    right = None
    if adapter.name == "blip":
        said = write_captions(model, adapter, pairs.batches, pairs.tokenizer, max_length=MAX_TOKENS)
        checks = [is_fully_right(*each) for each in zip(said, pairs.facts, strict=True)]
        right = 100 * sum(checks) / len(checks)
    return Figures(recall.image_to_text[1], recall.text_to_image[1], right)


@dataclass(frozen=True)
class Subject:
    """A demo model with what pruning and measuring it takes."""

    source: Path
    model: nn.Module
    adapter: Adapter
    calibration: Iterable[Batch]
    pairs: Pairs

    @classmethod
    def load(cls, source: Path, data: Path) -> Subject:
        """Loads a model and the data, as its own processor makes them into batches.

        Args:
            source: the model's folder.
            data: with the image folders `calibration` and `test`.

        Raises:
            VlpError: if one of them cannot be read.
        """
        model, adapter = load_model(str(source), device="cpu")
        calibration = batches(data / "calibration", model, batch_size=CALIBRATION_BATCH)
        return cls(source, model, adapter, calibration, Pairs.read(data / "test", model))

    def measure(self) -> Figures:
        """What the model can do as it is now."""
        return measure(self.model, self.adapter, self.pairs)

    def measure_under(self, masks: Masks) -> Figures:
        """What the model can do with the masks applied; it has its weights back afterwards."""
        with restored(WeightMap.of(self.model, self.adapter)):
            masks.apply(self.model, self.adapter)
            return self.measure()
