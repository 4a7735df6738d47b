"""Batches that `Adapter.collate` makes of a source."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned_files import CAPTIONS
from tiny_processors import save_side_by_side
from torch import nn

from vlp_plugins.adapter import Adapter, Batch, Stream, WeightSpec
from vlp_plugins.data import CaptionedBatches, load_processor, open_source
from vlp_plugins.errors import DataError


class Plain(Adapter):
    """Knows no model; has the `collate` that every adapter inherits."""

    name = "plain"

    def claims(self, model: nn.Module) -> bool:
        return False

    def weights(self, model: nn.Module) -> list[WeightSpec]:
        return []

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        return iter(())


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(str(save_side_by_side(tmp_path_factory.mktemp("model"))))


def batches_of(folder: Path, processor: Any, size: int, **options: Any) -> CaptionedBatches:
    return CaptionedBatches(open_source(str(folder)), processor, Plain(), size, **options)


def sizes(batches: CaptionedBatches) -> list[int]:
    return [len(batch["input_ids"]) for batch in batches]


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_a_batch_holds(photos: Path, processor: Any) -> None:
    (batch,) = batches_of(photos, processor, 4)
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["attention_mask"].sum(1).tolist() == [len(c.split()) + 2 for c in CAPTIONS]
    words = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert words == CAPTIONS


def test_every_iteration_yields_the_same(photos: Path, processor: Any) -> None:
    for seed in (None, 5):
        batches = batches_of(photos, processor, 2, shuffle_seed=seed)
        first, second = list(batches), list(batches)
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
    plain = list(batches_of(photos, processor, 2))
    assert not all(same(a, b) for a, b in zip(first, plain, strict=True))


@pytest.mark.parametrize(
    ("pairs", "size", "limit", "expected"),
    [
        (10, 5, None, [5, 5]),
        (10, 4, None, [4, 4, 2]),
        (9, 4, None, [4, 4]),  # a single pair is left out
        (3, 1, None, [1, 1, 1]),  # unless that is what was asked for
        (3, 8, None, [3]),
        (10, 4, 2, [4, 4]),
        (10, 4, 3, [4, 4, 2]),
        (10, 4, 9, [4, 4, 2]),
    ],
)
def test_sizes_and_their_number(
    numbered: Callable[[int], Path],
    processor: Any,
    pairs: int,
    size: int,
    limit: int | None,
    expected: list[int],
) -> None:
    batches = batches_of(numbered(pairs), processor, size, limit=limit)
    assert len(batches) == len(expected)
    assert sizes(batches) == expected


def test_a_single_pair_is_no_batch(numbered: Callable[[int], Path], processor: Any) -> None:
    with pytest.raises(DataError, match="a single captioned image, and a batch of 4 needs"):
        list(batches_of(numbered(1), processor, 4))


def test_a_stream_has_no_length(photos: Path, processor: Any) -> None:
    source = open_source(str(photos))
    source.length = None
    batches = CaptionedBatches(source, processor, Plain(), 2)
    with pytest.raises(TypeError, match="unknown length"):
        len(batches)
    assert operator.length_hint(batches, -1) == -1
    assert sizes(batches) == [2, 2]


def test_damaged_images_are_judged_where_the_limit_stops(
    numbered: Callable[[int], Path], processor: Any
) -> None:
    folder = numbered(100)
    for number in (1, 2):  # 2 of 100 are few, 2 of the first 6 are not
        (folder / f"{number:03}.png").write_bytes(b"no image")
    assert sum(sizes(batches_of(folder, processor, 4))) == 98
    with pytest.raises(DataError, match="2 of 6 records read cannot be used"):
        list(batches_of(folder, processor, 4, limit=1))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "limit": 0}])
def test_sizes_below_1(photos: Path, processor: Any, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="must be at least 1, not 0"):
        CaptionedBatches(open_source(str(photos)), processor, Plain(), **options)
