"""Downstream scenes and their captions: unlike pre-training, true of one scene, split by scan."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from benchmarks.demo import captions as pretraining
from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.demo.language import Fact
from benchmarks.demo.processors import MAX_TOKENS, build_tokenizer
from benchmarks.demo.samples import unseen_sample
from benchmarks.demo.scenes import CELL_SIZE, PALETTE
from benchmarks.papers.downstream import scenes
from benchmarks.papers.downstream.painting import place, texture
from benchmarks.papers.downstream.samples import CAPTIONS, QUESTIONS, Sample, draw_sample
from benchmarks.papers.downstream.scene_files import facts_of, write_scenes
from benchmarks.papers.downstream.scenes import draw
from benchmarks.papers.downstream.shades import SHADES, mix
from benchmarks.papers.downstream.splits import SPLITS, pick, scans_of, seed_of
from benchmarks.papers.downstream.wording import CELLS, LANGUAGE, PATTERNS, caption, is_true


@pytest.fixture(scope="module")
def sample() -> Sample:
    return draw_sample("test", 300)


def test_no_scan_is_in_two_splits() -> None:
    rows = [{bytes(image.numpy()) for image in scans_of(split).images} for split in SPLITS]
    assert all(not one & two for one, two in combinations(rows, 2))
    assert sum(len(scans_of(split)) for split in SPLITS) == len(load_digits().target)


def test_the_test_shares_no_scan_with_the_pretraining_and_its_test() -> None:
    from benchmarks.demo.scans import load_scans

    test = {bytes(image.numpy()) for image in scans_of("test").images}
    for split in ("pretrain", "test"):
        assert not test & {bytes(image.numpy()) for image in load_scans(split).images}


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown split 'val'"):
        scans_of("val")  # type: ignore[arg-type]


def test_seeds_differ_between_splits_and_runs() -> None:
    assert len({seed_of(split, seed) for split in SPLITS for seed in range(50)}) == 150


def test_scans_are_picked_by_digit() -> None:
    source = scans_of("train")
    digits = torch.arange(10).repeat(3).view(3, 10)
    chosen = pick(source, digits, torch.Generator().manual_seed(0))
    assert chosen.shape == (3, 10, 8, 8)
    of = {
        bytes(image.numpy()): int(d) for image, d in zip(source.images, source.digits, strict=True)
    }
    found = [[of[bytes(image.numpy())] for image in row] for row in chosen]
    assert found == digits.tolist()


def test_ink_lies_where_it_was_put() -> None:
    centres = torch.tensor([[8.0, 8.0], [36.0, 24.0]])
    ink = place(torch.ones(2, 8, 8), centres, torch.tensor([8.0, 16.0]), torch.zeros(2), 48)
    for image, (x, y), size in zip(ink, centres.tolist(), (8, 16), strict=True):
        assert float(image.sum()) == pytest.approx(size * size, rel=0.15)
        rows, columns = image.sum(1), image.sum(0)
        line = torch.arange(48) + 0.5
        assert float((rows * line).sum() / rows.sum()) == pytest.approx(y, abs=0.1)
        assert float((columns * line).sum() / columns.sum()) == pytest.approx(x, abs=0.1)


def test_a_quarter_turn_turns_the_scan() -> None:
    scan = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[8.0, 8.0]]), torch.tensor([16.0])
    upright = place(scan, *whole, torch.tensor([0.0]), 16)
    turned = place(scan, *whole, torch.tensor([torch.pi / 2]), 16)
    clockwise = torch.rot90(upright, -1, (1, 2))
    anticlockwise = torch.rot90(upright, 1, (1, 2))
    gaps = [float((turned - way).abs().max()) for way in (clockwise, anticlockwise)]
    assert min(gaps) < 1e-4


def test_grounds_are_as_light_as_asked_for() -> None:
    ground = texture(50, 16, torch.Generator().manual_seed(0), light=(0.2, 0.4), rough=0.05)
    assert ground.shape == (50, 3, 16, 16)
    assert 0.1 <= float(ground.min()) < float(ground.max()) <= 0.5
    assert float(ground.flatten(2).std(dim=2).mean()) > 0.01


def test_shades_are_near_their_name_and_not_those_of_pretraining() -> None:
    colours = torch.arange(len(COLOURS)).repeat(100)
    shades = mix(colours, torch.Generator().manual_seed(0))
    middles = SHADES.mean(dim=1)
    nearest = torch.cdist(shades, middles).argmin(dim=1)
    assert torch.equal(nearest, colours)
    assert float((shades - PALETTE[colours]).abs().sum(dim=1).min()) > 0.15


def test_captions_are_read_back_and_true() -> None:
    rng = np.random.default_rng(0)
    facts = frozenset({Fact(0, 8, 0), Fact(4, 8, 1), Fact(6, 3, 4), Fact(5, 1, 8)})
    said = {caption(facts, rng) for _ in range(500)}
    assert len(said) > 40 * len(PATTERNS)
    for sentence in said:
        stated = LANGUAGE.parse(sentence)
        assert stated is not None
        assert len(stated) == 2
        assert stated < facts
        assert is_true(sentence, facts)


def test_every_wording_of_every_object_is_read_back() -> None:
    rng = np.random.default_rng(0)
    for colour in range(len(COLOURS)):
        for digit in range(len(DIGITS)):
            for cell in range(len(CELLS)):
                facts = [Fact(colour, digit, cell), Fact((colour + 1) % 7, 8, (cell + 1) % 9)]
                assert LANGUAGE.parse(LANGUAGE.write(facts, rng)) == frozenset(facts)


@pytest.mark.parametrize(
    "said",
    [
        "the red seven is at the top left and the blue three is at the top right",  # wrong place
        "the red seven is at the top left",  # one object
        "the red seven is at the top left and the blue",
        "a red seven in the top left and a blue three in the middle",  # pre-training's wording
    ],
)
def test_what_is_not_true(said: str) -> None:
    truth = frozenset({Fact(0, 7, 0), Fact(2, 3, 4), Fact(1, 1, 1)})
    assert is_true("the red seven is at the top left , the blue three is at the centre", truth)
    assert not is_true(said, truth)


def test_a_scene_of_one_object_has_no_caption() -> None:
    with pytest.raises(ValueError, match="names 2 objects; the scene has 1"):
        caption(frozenset({Fact(0, 0, 0)}), np.random.default_rng(0))


def test_wording_is_new_and_the_tokenizer_knows_every_word(sample: Sample) -> None:
    assert set(LANGUAGE.words()) <= set(pretraining.words())
    tokenizer = build_tokenizer("blip")
    for said in {text for texts in sample.captions for text in texts}:
        assert pretraining.parse(said) is None
        ids = tokenizer(said, truncation=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= MAX_TOKENS


def test_a_caption_is_true_of_its_scene_only(sample: Sample) -> None:
    for number, texts in enumerate(sample.captions):
        assert len(set(texts)) == CAPTIONS
        for stated in map(LANGUAGE.parse, texts):
            assert stated is not None
            assert [i for i, facts in enumerate(sample.facts) if stated <= facts] == [number]


def test_scenes_have_two_to_four_objects_in_places_of_their_own(sample: Sample) -> None:
    counts = [len(facts) for facts in sample.facts]
    assert {count: counts.count(count) > 60 for count in set(counts)} == {2: True, 3: True, 4: True}
    assert all(len({fact.cell for fact in facts}) == len(facts) for facts in sample.facts)
    assert {len(questions) for questions in sample.questions} == {QUESTIONS}


def test_pictures_show_what_the_facts_say() -> None:
    drawn = draw(100, scans_of("train"), torch.Generator().manual_seed(0))
    assert drawn.images.dtype == torch.uint8
    pixels = drawn.images.float() / 255
    right = total = 0
    for image, facts in zip(pixels, drawn.facts, strict=True):
        tiles = image.unfold(1, CELL_SIZE, CELL_SIZE).unfold(2, CELL_SIZE, CELL_SIZE)
        contrast = tiles.flatten(3).std(dim=3).sum(dim=0).flatten()
        order = contrast.argsort(descending=True)[: len(facts)]
        right += len({int(cell) for cell in order} & {fact.cell for fact in facts})
        total += len(facts)
    assert right / total > 0.9


def test_scenes_are_unlike_those_of_pretraining(sample: Sample) -> None:
    before = unseen_sample(300).images.float().mean()
    assert float(sample.images.float().mean()) > 1.6 * float(before)


def test_same_seed_same_sample() -> None:
    one, two = (draw_sample("dev", 20, seed=5) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert (one.captions, one.questions) == (two.captions, two.questions)
    assert draw_sample("dev", 20, seed=6).captions != one.captions


def test_a_sample_of_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw_sample("test", 0)


def test_more_scenes_than_there_can_be_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COLOURS", COLOURS[:1])  # 3,600 pairs of objects are left
    with pytest.raises(ValueError, match="2,000 scenes would share pairs of objects"):
        draw_sample("test", 2000)


def test_what_a_scene_shows_is_read_as_it_was_written(tmp_path: Path) -> None:
    drawn = draw_sample("test", 5, 0)
    write_scenes(tmp_path, "test", drawn)

    lines = (tmp_path / "test" / "metadata.jsonl").read_text().splitlines()

    assert [facts_of(json.loads(line)["objects"]) for line in lines] == list(drawn.facts)
