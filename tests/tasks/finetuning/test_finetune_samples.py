"""What an epoch is made of: every caption once, no image twice in a pass, the same every time."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlp_adapters.vit.adapter import ViTAdapter
from vlp_adapters.xvlm.adapter import XvlmAdapter
from vlp_plugins.data.records import Sample
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.tasks.finetuning.samples import SampleEpochs


class Words:
    """A tokenizer of numbers, and an image processor that keeps one pixel."""

    mask_token_id = None

    def __init__(self) -> None:
        self.tokenizer = self

    def __call__(self, text: Any = None, images: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        made = {}
        if images is not None:
            made |= pixels(images, "pt")
        if text is not None:
            rows = [[int(word) for word in line.split()] for line in text]
            longest = max(map(len, rows))
            made["input_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            made["attention_mask"] = made["input_ids"].sign()
        return made

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        return []


def pixels(images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
    """A processor of images only."""
    return {"pixel_values": torch.tensor([np.asarray(image)[0, 0, 0] for image in images])}


def image(number: int) -> Any:
    return lambda: Image.new("RGB", (2, 2), (number, 0, 0))


def captioned(counts: list[int]) -> list[Sample]:
    return [
        Sample(f"{n}.png", image(n), tuple(f"{100 * (n + 1) + k}" for k in range(count)))
        for n, count in enumerate(counts)
    ]


def epochs(samples: list[Sample], size: int, seed: int = 0) -> SampleEpochs:
    return SampleEpochs(samples, Words(), XvlmAdapter(), size, seed=seed)


def rows_of(made: SampleEpochs, epoch: int) -> list[tuple[int, int]]:
    found = []
    for lazy in made(epoch):
        batch = lazy()
        found += zip(batch["pixel_values"].tolist(), batch["input_ids"][:, 0].tolist(), strict=True)
    return found


def test_an_epoch_has_every_caption_once_with_its_image() -> None:
    rows = rows_of(epochs(captioned([3, 1, 2, 3, 3]), 4), 0)
    assert len(rows) == 12
    assert len(set(rows)) == 12
    assert all(word // 100 == number + 1 for number, word in rows)


def test_a_pass_shows_no_image_twice() -> None:
    rows = rows_of(epochs(captioned([2] * 6), 6), 0)
    assert [len({number for number, _ in rows[i : i + 6]}) for i in (0, 6)] == [6, 6]


@pytest.mark.parametrize(("images", "size"), [(3, 2), (7, 5), (40, 16)])
def test_no_batch_shows_an_image_twice_even_between_passes(images: int, size: int) -> None:
    made = epochs(captioned([3] * images), size)
    for epoch in range(10):
        rows = rows_of(made, epoch)
        assert len(rows) == 3 * images // size * size
        assert len(set(rows)) == len(rows)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        whole = [len({number for number, _ in batch}) for batch in batches]
        assert set(whole[:-1]) == {size}, "what waits at the very end has nowhere to go"


def test_a_batch_of_more_rows_than_there_are_images_shows_some_twice() -> None:
    rows = rows_of(epochs(captioned([4] * 3), 6), 0)
    assert len(set(rows)) == 12


def test_the_mixture_depends_on_seed_and_epoch_only() -> None:
    samples = captioned([2] * 8)
    one = [rows_of(epochs(samples, 4), epoch) for epoch in (0, 1)]
    torch.manual_seed(5)
    again = epochs(samples, 4)
    assert [rows_of(again, epoch) for epoch in (0, 1)] == one
    assert one[0] != one[1]
    assert rows_of(epochs(samples, 4, seed=1), 0) != one[0]


def test_answers_are_drawn_as_often_as_they_were_said() -> None:
    samples = [Sample(str(n), image(n), (f"{n + 1}",), ("7", "7", "7", "8 9")) for n in range(20)]
    made, counts = epochs(samples, 10), Counter[tuple[int, ...]]()
    for epoch in range(20):
        for lazy in made(epoch):
            counts.update(map(tuple, lazy()["labels"].tolist()))
    assert set(counts) <= {(7,), (7, -100), (8, 9)}
    assert counts[8, 9] / counts.total() == pytest.approx(0.25, abs=0.06)


def test_classes_are_labels() -> None:
    samples = [Sample(str(n), image(n), label=n % 3) for n in range(6)]

    (lazy,) = SampleEpochs(samples, pixels, ViTAdapter(), 6)(0)
    batch = lazy()
    assert batch["labels"].dtype == torch.int64
    assert (batch["labels"] == batch["pixel_values"] % 3).all()


def test_a_damaged_image_is_left_out_of_its_batch(caplog: pytest.LogCaptureFixture) -> None:
    samples = captioned([1] * 4)
    samples[2] = Sample("broken.png", lambda: Image.open(io.BytesIO(b"no image")), ("300",))
    (lazy,) = epochs(samples, 4)(0)
    assert sorted(lazy()["pixel_values"].tolist()) == [0, 1, 3]
    assert "left out broken.png" in caplog.text
    (lazy,) = epochs([samples[2]] * 3 + samples[:1], 4)(0)
    with pytest.raises(DataError, match="only 1 can be read"):
        lazy()


def test_less_than_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="3 rows, fewer than a batch of 4"):
        epochs(captioned([1, 2]), 4)
