"""The demo's data: scenes, captions whose truth can be checked, splits that share no scan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoProcessor

from benchmarks.demo import MODELS, captions
from benchmarks.demo.build_data import build, write_folder
from benchmarks.demo.captions import CELLS, COLOURS, DIGITS, PATTERNS, Fact
from benchmarks.demo.processors import (
    FAMILIES,
    MAX_TOKENS,
    Family,
    build_tokenizer,
    normalise,
    save_processors,
    tokenize,
)
from benchmarks.demo.samples import (
    calibration_sample,
    draw_sample,
    read_folder,
    unseen_sample,
)
from benchmarks.demo.scans import load_scans, split_indices
from benchmarks.demo.scenes import CELL_SIZE, HELD_OUT, IMAGE_SIZE, PALETTE, draw, is_held_out

ALL_FACTS = [
    Fact(colour, digit, cell)
    for colour in range(len(COLOURS))
    for digit in range(len(DIGITS))
    for cell in range(len(CELLS))
]


def test_three_splits_cover_every_scan_once() -> None:
    digits = load_digits().target
    parts = [split_indices(digits, split) for split in ("pretrain", "downstream", "test")]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    for part in parts:
        assert set(digits[part]) == set(range(10))


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown split 'train'"):
        split_indices(np.arange(10), "train")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2])
def test_every_caption_is_read_back_exactly(size: int) -> None:
    rng = np.random.default_rng(0)
    for first in ALL_FACTS:
        second = ALL_FACTS[rng.integers(len(ALL_FACTS))]
        facts = [first] if size == 1 or second.cell == first.cell else [first, second]
        assert captions.parse(captions.write(facts, rng)) == frozenset(facts)


def test_wording_varies_and_fits_the_tokenizer() -> None:
    rng = np.random.default_rng(0)
    scene = [Fact(4, 8, 4), Fact(5, 1, 0)]
    said = {captions.write(scene, rng) for _ in range(300)}
    assert len(said) > 20 * len(PATTERNS)
    assert any("an eight" in caption for caption in said)
    assert not any(" a eight" in f" {caption}" for caption in said)
    tokenizer = build_tokenizer("blip")
    for caption in said:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= MAX_TOKENS
        assert captions.parse(tokenizer.decode(ids, skip_special_tokens=True)) == frozenset(scene)


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("a red seven in the top left and a blue three in the middle", {(0, 7, 0), (2, 3, 4)}),
        ("Blue three centre, red seven upper left", {(0, 7, 0), (2, 3, 4)}),
        ("a seven in red at the middle left", {(0, 7, 3)}),
    ],
)
def test_what_a_caption_states(caption: str, facts: set[tuple[int, int, int]]) -> None:
    assert captions.parse(caption) == facts


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red in the top left",
        "a red seven in the top left and a blue",
        "a red seven in the top left and a blue seven in the upper left",
        "not a red seven in the top left",
    ],
)
def test_what_is_no_caption(caption: str) -> None:
    assert captions.parse(caption) is None


def test_fully_right_means_every_object_and_no_other() -> None:
    truth = frozenset({Fact(0, 7, 0), Fact(2, 3, 4)})
    assert captions.is_fully_right("blue three centre , red seven top left", truth)
    assert not captions.is_fully_right("red seven top left", truth)
    assert not captions.is_fully_right("blue three centre , red one top left", truth)
    assert not captions.is_fully_right("blue three centre , red seven top right", truth)


def test_an_empty_scene_has_no_caption() -> None:
    with pytest.raises(ValueError, match="at least one object"):
        captions.write([], np.random.default_rng(0))


def test_scenes_show_the_colours_where_they_say() -> None:
    scenes = draw(
        200, load_scans("pretrain"), torch.Generator().manual_seed(0), single_fraction=0.5
    )
    assert scenes.images.shape == (200, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert scenes.images.dtype == torch.uint8
    pixels = scenes.images.float() / 255
    for image, facts in zip(pixels, scenes.facts(), strict=True):
        tiles = image.unfold(1, CELL_SIZE, CELL_SIZE).unfold(2, CELL_SIZE, CELL_SIZE)
        brightest = tiles.flatten(3).amax(dim=3).flatten(1).T  # [9, 3]
        bright_cells = {int(cell) for cell in torch.nonzero(brightest.amax(dim=1) > 0.5)}
        assert bright_cells == {fact.cell for fact in facts}
        for fact in facts:
            nearest = (PALETTE - brightest[fact.cell]).abs().sum(dim=1).argmin()
            assert int(nearest) == fact.colour


def test_training_scenes_leave_the_held_out_combinations_out() -> None:
    scans = load_scans("pretrain")
    seen = draw(1500, scans, torch.Generator().manual_seed(0))
    assert not is_held_out(seen.colours, seen.digits).any()
    free = draw(1500, scans, torch.Generator().manual_seed(0), training=False)
    share = is_held_out(free.colours, free.digits).float().mean()
    assert share == pytest.approx(len(HELD_OUT) / 70, abs=0.015)


def test_no_test_caption_is_true_of_another_test_scene() -> None:
    sample = unseen_sample(1000)
    stated = [captions.parse(caption) for caption in sample.captions]
    assert stated == sample.facts
    assert len(set(sample.captions)) == len(set(sample.facts)) == 1000
    # every caption names all objects of its scene, so "true of another" means equal facts
    assert {len(facts) for facts in sample.facts} == {2}
    new = [any(fact[:2] in HELD_OUT for fact in facts) for facts in sample.facts]
    assert 50 < sum(new) < 200


def test_same_seed_same_sample() -> None:
    one, two = (draw_sample("test", 20, seed=5) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert one.captions == two.captions
    assert draw_sample("test", 20, seed=6).captions != one.captions


def test_a_sample_of_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw_sample("test", 0, seed=0)


def test_image_folders_hold_what_was_drawn(tmp_path: Path) -> None:
    build(tmp_path, calibration=12, downstream=0, test=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "test"]
    read, drawn = read_folder(tmp_path / "calibration"), calibration_sample(12)
    assert torch.equal(read.images, drawn.images)
    assert (read.captions, read.facts) == (drawn.captions, drawn.facts)
    with pytest.raises(FileExistsError, match="not empty"):
        write_folder(drawn, tmp_path / "test")


def test_the_datasets_library_reads_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    write_folder(calibration_sample(4), tmp_path / "images")
    loaded = datasets.load_dataset(
        "imagefolder",
        data_dir=str(tmp_path / "images"),
        split="train",
        cache_dir=tmp_path / "cache",
    )
    assert loaded["text"] == calibration_sample(4).captions
    assert loaded[0]["image"].size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_what_the_processor_of_the_shipped_model_gives(
    family: Family, tmp_path: Path
) -> None:
    sample = calibration_sample(4)
    processor = AutoProcessor.from_pretrained(MODELS / family)
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    processed = processor(images=list(sample.images), text=sample.captions, **options)
    torch.testing.assert_close(processed["pixel_values"], normalise(sample.images))
    tokens, mask = tokenize(build_tokenizer(family), sample.captions)
    assert torch.equal(processed["input_ids"], tokens)
    assert torch.equal(processed["attention_mask"], mask)

    save_processors(family, tmp_path)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text()) == json.loads((MODELS / family / path.name).read_text())
