"""Fixed sets of captioned scenes: calibration, downstream training, test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import captions
from benchmarks.demo.captions import Fact
from benchmarks.demo.scans import Split, load_scans
from benchmarks.demo.scenes import PAIRS, draw
from vlp_plugins.data.images import read_image


@dataclass(frozen=True)
class Sample:
    """Captioned scenes.

    Attributes:
        images: uint8 `[n, 3, 48, 48]`.
        captions: n sentences, one per image.
        facts: what each scene shows.
    """

    images: Tensor
    captions: list[str]
    facts: list[frozenset[Fact]]

    def __len__(self) -> int:
        return len(self.captions)


def draw_sample(
    split: Split,
    count: int,
    seed: int,
    *,
    objects: tuple[int, int] = PAIRS,
    held_out: bool = False,
) -> Sample:
    """Draw `count` scenes, no two of which show the same objects in the same places.

    Captions name everything that a scene shows, so they are distinct and none of them is true
    of another scene of the sample: retrieval has one right answer.

    Args:
        split: the handwriting to use.
        count: number of scenes.
        seed: same seed, same sample.
        objects: fewest and most in a scene.
        held_out: also draw the (colour, digit) combinations that training never shows.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    generator = torch.Generator().manual_seed(seed)
    scans = load_scans(split)
    scenes = draw(2 * count + 64, scans, generator, objects=objects, training=not held_out)
    facts = [frozenset(objects) for objects in scenes.facts()]
    # dict keeps the first of each key, in order
    first = list({fact: index for index, fact in reversed(list(enumerate(facts)))}.values())
    chosen = sorted(first)[:count]
    rng = np.random.default_rng(seed)
    sentences = [captions.write(sorted(facts[index]), rng) for index in chosen]
    return Sample(scenes.images[chosen], sentences, [facts[index] for index in chosen])


CALIBRATION_SEED, DOWNSTREAM_SEED, VALIDATION_SEED, TEST_SEED = 11, 12, 13, 14


def calibration_sample(count: int = 1000, objects: tuple[int, int] = PAIRS) -> Sample:
    """Scenes like those of pre-training (same handwriting): what pruning may look at."""
    return draw_sample("pretrain", count, CALIBRATION_SEED, objects=objects)


def downstream_sample(count: int = 2000, objects: tuple[int, int] = PAIRS) -> Sample:
    """Scenes in a second set of handwritings: for fine-tuning after pruning."""
    return draw_sample("downstream", count, DOWNSTREAM_SEED, objects=objects)


def validation_sample(count: int = 500, objects: tuple[int, int] = PAIRS) -> Sample:
    """Scenes in the downstream handwritings, to watch pre-training without touching the test."""
    return draw_sample("downstream", count, VALIDATION_SEED, objects=objects)


def unseen_sample(count: int = 1000, objects: tuple[int, int] = PAIRS) -> Sample:
    """Scenes in a third set of handwritings, with combinations that training never showed."""
    return draw_sample("test", count, TEST_SEED, objects=objects, held_out=True)


def read_folder(folder: Path) -> Sample:
    """Read an image folder that `build_data` wrote.

    Raises:
        ValueError: if a caption is not one of this language (its truth could not be checked).
    """
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    facts = []
    for row in rows:
        stated = captions.parse(row["text"])
        if stated is None:
            raise ValueError(f"{folder}: cannot read the caption {row['text']!r}")
        facts.append(stated)
    images = [np.array(read_image(folder / row["file_name"]).convert("RGB")) for row in rows]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Sample(pixels, [row["text"] for row in rows], facts)
