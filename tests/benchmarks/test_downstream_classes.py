"""Sets to classify, the ViT that is pre-trained without their labels, and all files as written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.demo.captions import DIGITS
from benchmarks.papers.downstream import pretrain_vit, vit
from benchmarks.papers.downstream.build import build
from benchmarks.papers.downstream.class_files import write_cifar_10, write_cifar_100, write_flowers
from benchmarks.papers.downstream.classes import FRAMES, SETS, SHOTS, SIDE, SIZES, draw_frames
from benchmarks.papers.downstream.questions import ANSWERS
from benchmarks.papers.downstream.samples import draw_sample
from benchmarks.papers.downstream.scene_files import write_scenes
from benchmarks.papers.downstream.splits import SPLITS, scans_of
from benchmarks.papers.downstream.views import unlabelled
from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.records import Samples
from vlp_plugins.data.sources import open_source

EIGHT_MB = 8_000_000


@pytest.mark.parametrize(("name", "count"), [("digits", 10), ("coloured", 70), ("framed", 40)])
def test_classes_are_balanced_and_named(name: str, count: int) -> None:
    one = SETS[name].draw("test", 5 * count)
    assert one.images.shape == (5 * count, 3, SIDE, SIDE)
    assert one.images.dtype == torch.uint8
    assert len(set(one.classes)) == count
    assert torch.bincount(one.labels).tolist() == [5] * count
    for label, digit in enumerate(SETS[name].digits):
        assert one.classes[label].endswith(DIGITS[digit])


def test_usual_sizes() -> None:
    assert len(SETS["framed"].draw("train")) == len(SETS["framed"].draw("dev")) == 40 * SHOTS
    assert len(SETS["framed"].draw("test")) == SIZES["test"]
    assert len(SETS["coloured"].draw("dev")) == SIZES["dev"]


def test_seeds_and_splits_give_other_images() -> None:
    draw = SETS["digits"].draw
    assert torch.equal(draw("train", 20).images, draw("train", 20).images)
    others = [draw("train", 20, 1), draw("dev", 20), draw("test", 20)]
    assert not any(torch.equal(draw("train", 20).images, other.images) for other in others)


def test_a_set_of_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SETS["digits"].draw("train", 0)


def test_frames_are_the_shapes_they_are_called() -> None:
    kinds = torch.arange(len(FRAMES)).repeat(20)
    frames = draw_frames(kinds, SIDE, torch.Generator().manual_seed(0)) > 0.5
    middle = frames[:, SIDE // 2 - 4 : SIDE // 2 + 4, SIDE // 2 - 4 : SIDE // 2 + 4]
    assert not middle.any()  # room for the digit
    on_axis = frames[:, :, SIDE // 2].any(dim=1)
    assert not on_axis[kinds == FRAMES.index("barred")].any()
    assert on_axis[kinds < FRAMES.index("pointed")].all()  # a diamond's points are cut off
    corner = torch.arange(SIDE)
    diagonal = frames[:, corner, corner].float().argmax(dim=1).float()  # first hit from top left
    mean = {name: float(diagonal[kinds == i].mean()) for i, name in enumerate(FRAMES)}
    assert mean["square"] < mean["round"] < mean["pointed"]


def _images(found: Samples) -> tuple[torch.Tensor, list[int]]:
    items = list(found.items)
    pixels = np.stack([np.asarray(item.image().convert("RGB")) for item in items])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [item.label for item in items]


def test_cifar_files_are_read_back_exactly(tmp_path: Path) -> None:
    train, test = SETS["digits"].draw("train", 33), SETS["digits"].draw("test", 12)
    write_cifar_10(tmp_path / "ten", train, test)
    fine = SETS["coloured"].draw("train", 140), SETS["coloured"].draw("test", 70)
    write_cifar_100(tmp_path / "hundred", *fine, DIGITS)
    write_cifar_10(tmp_path / "dev", None, test)
    for place, split, drawn in (
        ("ten", "train", train),
        ("ten", "test", test),
        ("dev", "test", test),
        ("hundred", "train", fine[0]),
        ("hundred", "test", fine[1]),
    ):
        read = open_labelled(str(tmp_path / place), split)
        images, labels = _images(read)
        assert torch.equal(images, drawn.images)
        assert labels == drawn.labels.tolist()
        assert read.classes == tuple(name.replace(" ", "_") for name in drawn.classes)


def test_flowers_files_are_read_back(tmp_path: Path) -> None:
    parts = [SETS["framed"].draw(split, 40) for split in SPLITS]
    write_flowers(tmp_path, *parts)
    for split, drawn in zip(("train", "val", "test"), parts, strict=True):
        images, labels = _images(open_labelled(str(tmp_path), split))
        assert labels == drawn.labels.tolist()
        assert float((images.float() - drawn.images.float()).abs().mean()) < 3  # JPEG of 0..255


def test_scenes_are_read_back_as_coco_and_vqa_are(tmp_path: Path) -> None:
    drawn = {split: draw_sample(split, 12) for split in SPLITS}
    for split, sample in drawn.items():
        write_scenes(tmp_path, split, sample)
    for name, split in (("train", "train"), ("val", "dev"), ("test", "test")):
        sample = drawn[split]  # type: ignore[index]
        listed = open_source(str(tmp_path), split=name, captions="all")
        plain = open_source(str(tmp_path / name), captions="all")
        for source in (listed, plain):
            pairs = list(source)
            texts = [text for texts in sample.captions for text in texts]
            assert [text for _, text in pairs] == texts
            first = torch.from_numpy(np.asarray(pairs[0][0]).copy()).permute(2, 0, 1)
            assert torch.equal(first, sample.images[0])
        read = open_questions(str(tmp_path), name)
        asked = [question for questions in sample.questions for question in questions]
        assert [(q.texts[0], q.answers) for q in read.items] == [(q.text, q.answers) for q in asked]
        assert read.answers == ANSWERS
    with pytest.raises(FileExistsError):
        write_scenes(tmp_path, "dev", drawn["dev"])


def test_metadata_names_the_objects(tmp_path: Path) -> None:
    sample = draw_sample("dev", 5)
    write_scenes(tmp_path, "dev", sample)
    rows = [json.loads(line) for line in (tmp_path / "val" / "metadata.jsonl").open()]
    assert [len(row["objects"]) for row in rows] == [len(facts) for facts in sample.facts]
    for row, texts in zip(rows, sample.captions, strict=True):
        digits = {digit for _, digit, _ in row["objects"]}
        assert {word for text in texts for word in text.split()} & set(DIGITS) <= digits


def test_build_writes_what_is_asked_for_and_the_same_again(tmp_path: Path) -> None:
    sizes = dict.fromkeys(SPLITS, 40)
    for name in ("one", "two"):
        build(tmp_path / name, parts=("digits", "framed", "scenes"), sizes=sizes)  # type: ignore[arg-type]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"digits", "digits-dev", "framed", "scenes"}
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    for file in files:
        if file.suffix != ".mat":  # has the date in it
            one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
            assert one == two, file
    with pytest.raises(FileExistsError, match="is not empty"):
        build(tmp_path / "one", parts=())


def test_unlabelled_images_come_with_their_scan_and_ink() -> None:
    batch = unlabelled(64, scans_of("train"), torch.Generator().manual_seed(0))
    assert batch.images.shape == (64, 3, SIDE, SIDE)
    known = {bytes(image.numpy()) for image in scans_of("train").images}
    assert all(bytes(scan.numpy()) in known for scan in batch.scans)
    assert float(batch.colours.amax(dim=1).min()) >= 0.75


def test_recovery_is_perfect_where_everything_is_right() -> None:
    batch = unlabelled(4, scans_of("train"), torch.Generator().manual_seed(0))
    right = torch.cat([batch.scans.flatten(1), batch.colours], dim=1)
    assert float(vit.recovery_loss(right, batch.scans, batch.colours)) == 0
    off = right + torch.cat([torch.full((64,), 0.1), torch.full((3,), 0.2)])
    loss = float(vit.recovery_loss(off, batch.scans, batch.colours))
    assert loss == pytest.approx(0.1**2 + 0.2**2, rel=1e-4)


def test_vit_is_trained_logged_and_loads(tmp_path: Path) -> None:
    pretrain_vit.train(tmp_path, steps=12, batch_size=16, seed=0, log_steps=6, watched=80)
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert [record["step"] for record in log] == [6, 12]
    assert log[1]["loss"] < log[0]["loss"]
    assert {"neighbour_digits", "neighbour_coloured"} <= set(log[0])
    processor = vit.build_image_processor()
    images = SETS["digits"].draw("dev", 3).images
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    made = processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, vit.normalise(images))


def test_learning_rate_rises_and_falls() -> None:
    rates = [pretrain_vit.learning_rate(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(pretrain_vit.PEAK_LEARNING_RATE, rel=0.02)


def test_the_shipped_vit_knows_handwriting_and_is_small() -> None:
    from vlp_plugins.loading import load_model

    assert (vit.MODEL / "model.safetensors").stat().st_size < EIGHT_MB
    model, adapter = load_model(str(vit.MODEL), device="cpu")
    assert adapter.name == "vit"
    known, asked = SETS["digits"].draw("train", 1000), SETS["digits"].draw("test", 200)
    labels = vit.nearest_labels(model, known.images, known.labels, asked.images)
    assert float((labels == asked.labels).float().mean()) > 0.5  # chance is 0.1
