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

from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.processors import load_processor
from vlp_plugins.data.sources import open_source
from vlp_plugins.models.adapter import Adapter, Batch, Stream, WeightSpec
from vlp_plugins.runtime.errors import DataError


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


@pytest.mark.parametrize("seed", [None, 5])
def test_any_number_of_workers_makes_the_same_batches(
    numbered: Callable[[int], Path], processor: Any, seed: int | None
) -> None:
    folder = numbered(60)
    sorted(folder.glob("*.png"))[31].write_bytes(b"damaged")
    alone = list(batches_of(folder, processor, 4, shuffle_seed=seed, workers=0))
    assert len(alone) == 15  # 59 pairs
    for workers in (1, 3):
        batches = batches_of(folder, processor, 4, shuffle_seed=seed, workers=workers)
        assert all(same(a, b) for a, b in zip(alone, batches, strict=True))
        assert batches.source.skipped == 1


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


def damage(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(b"no image")


def test_a_few_damaged_images_are_few_whatever_the_limit(
    numbered: Callable[[int], Path], processor: Any
) -> None:
    folder = numbered(40)
    damage(folder, 2)  # 2 of 40 are few, though 2 of the first 4 or 10
    assert sum(sizes(batches_of(folder, processor, 4))) == 38
    for limit in (1, 2, 5):
        assert sizes(batches_of(folder, processor, 2, limit=limit)) == [2] * limit


def test_more_than_5_percent_damaged_stop_a_limited_run_too(
    numbered: Callable[[int], Path], processor: Any
) -> None:
    folder = numbered(40)
    damage(folder, 3)
    with pytest.raises(DataError, match="at least 3 of 40 records cannot be used"):
        list(batches_of(folder, processor, 2, limit=1))


def test_a_stream_of_unknown_length_may_begin_with_a_few_damaged_images(
    numbered: Callable[[int], Path], processor: Any
) -> None:
    def streamed(limit: int | None) -> CaptionedBatches:
        batches = batches_of(folder, processor, 2, limit=limit)
        batches.source.length = None
        return batches

    folder = numbered(20)
    damage(folder, 2)
    assert sizes(streamed(limit=2)) == [2, 2]
    with pytest.raises(DataError, match="2 of 20 records read"):  # at the end all is known
        list(streamed(limit=None))
    damage(folder, 11)  # more than 5% of the 200 that are tried
    with pytest.raises(DataError, match="11 of 13 records read"):
        list(streamed(limit=1))


def test_the_message_names_the_record_and_not_its_buffer(
    numbered: Callable[[int], Path], processor: Any
) -> None:
    folder = numbered(3)
    damage(folder, 1)
    with pytest.raises(DataError) as caught:
        list(batches_of(folder, processor, 2))
    assert "(first: 000.png: cannot identify image file)" in str(caught.value)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "limit": 0}])
def test_sizes_below_1(photos: Path, processor: Any, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="must be at least 1, not 0"):
        CaptionedBatches(open_source(str(photos)), processor, Plain(), **options)


@pytest.mark.parametrize(
    ("pairs", "limit", "said"),
    [
        (4, 1000, "2 batches of the 1,000 asked for"),
        (5, None, "the last pair is left out, as it makes no batch by itself"),
        (5, 3, "2 batches of the 3 asked for; the last pair is left out"),
        (4, 2, None),
        (4, 1, None),
    ],
)
def test_what_is_lacking_or_left_out_is_said_once(
    numbered: Callable[[int], Path], processor: Any, caplog, pairs, limit, said
) -> None:
    batches = batches_of(numbered(pairs), processor, 2, limit=limit)
    list(batches)
    list(batches)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    assert "; ".join(batches.shortfalls).startswith(said or "")
    assert all(said in line and line.startswith(batches.source.description) for line in lines)
