"""Every mistake ends in one line that says what to do; nothing is written."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import bad_world
import pytest
from conftest import Command
from safetensors.torch import load_file

from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins import prune
from vlp_plugins.errors import BatchError
from vlp_plugins.masks import Masks

PRUNE = "prune --out {out} --model {xvlm} --data {photos} --batch-size 4 --checkpoint-every 1 "
HALF = PRUNE + "--sparsity 0.5 "
MAGNITUDE = "prune --out {out} --method omp --sparsity 0.5 "

CASES = {
    # sparsity
    "sparsity of 1": (PRUNE + "--sparsity 1.0", r"lies in \[0, 1\), not 1"),
    "negative sparsity": (PRUNE + "--sparsity 0.5 -0.1", r"lies in \[0, 1\), not -0.1"),
    "per cent": (PRUNE + "--sparsity 63", r"not 63; did you mean 0.63\?"),
    "no number": (PRUNE + "--sparsity much", r"'much' is no sparsity; write 0.75, or vision=0.5"),
    "no sparsity": (PRUNE, r"no sparsity given; pass"),
    "twice the same": (HALF + "--sparsity 0.5", r"sparsity 0.5 is given twice"),
    "unknown modality": (PRUNE + "--sparsity vison=0.5", r"'vison', which this model has not .did "
                         r"you mean 'vision'"),
    "a modality without budget": (PRUNE + "--sparsity vision=0.5", r"no budget for modality 'text'"),
    "floor": (PRUNE + "--sparsity 0.9 --floor 0.2", r"floor of 0.2 and sparsity 0.9 exclude"),
    "pattern": (PRUNE + "--allocation keep=1,of=5", r"1 of 5 does not divide the 16 inputs of"),
    # names
    "misspelt method": (HALF + "--method multflow", r"no method is called 'multflow' .did you mean "
                        r"'multiflow'\?"),
    "unknown parameter": (HALF + "--parameter edgse=false", r"edgse.*did you mean 'edges'"),
    "no parameter": (HALF + "--parameter edges", r"'edges' is no parameter; write name=value"),
    "unknown adapter": (HALF + "--adapter xvml", r"no adapter is called 'xvml' .did you mean 'xvlm'"),
    "wrong adapter": (HALF + "--adapter vit", r"adapter 'vit' does not know XvlmForPretraining; "
                      r"leave it out"),
    "unknown allocation": (HALF + "--allocation layerwise", r"unknown allocation 'layerwise'.*layer"),
    "unknown device": (HALF + "--device gpu", r"device 'gpu' cannot be used .*; write cpu"),
    "unknown dtype": (HALF + "--dtype fp32", r"dtype 'fp32' is none of float32, bfloat16, float16"),
    "unknown key": ("prune {recipe}", r"line 1: unknown key 'methdo' .did you mean 'method'"),
    "no recipe": ("prune {empty}/recipe.yaml", r"cannot read recipe .*: No such file"),
    # model
    "no model": (MAGNITUDE, r"no model given; pass --model, or write `model: ...` in the recipe"),
    "no such path": (MAGNITUDE + "--model {empty}/model", r"model .* does not exist; check the path"),
    "no such hub id": (MAGNITUDE + "--model nobody/nothing", r"no such file or folder, and as a hub"),
    "no config": (MAGNITUDE + "--model {photos}", r"has no config.json; give the model's own"),
    "no checkpoint": (MAGNITUDE + "--model {noise}", r"a checkpoint file that no adapter recognises"),
    "unclaimed model": (MAGNITUDE + "--model {clip}", r"no adapter claims CLIPModel .*ModuleAdapter"
                        r".*--adapter module"),
    "truncated model": (MAGNITUDE + "--model {truncated_model}", r"cannot load the X-VLM model in"),
    "lacking weights": (MAGNITUDE + "--model {lacking}", r"lacks 1 parameter.*intermediate.dense"),
    "NaN in weights": (HALF + "--model {nan_weight}", r"weight 'text.0.ffn.fc1' .*16 NaN or "
                       r"infinite elements; the checkpoint is damaged"),
    "NaN in activations": (HALF + "--model {nan_input}", r"the input of text_encoder.bert.encoder."
                           r"layer.0.attention.self.query .weight 'text.0.self.query'.*batch 0"),
    # data
    "no data": ("prune --out {out} --model {xvlm} --sparsity 0.5", r"reads calibration data: give "
                r"--data FOLDER .*--statistics FILE"),
    "empty folder": (HALF + "--data {empty}", r"empty is empty; put images and metadata.jsonl"),
    "no such folder": (HALF + "--data {empty}/a/b", r"data .* does not exist: check the path"),
    "no captions": (HALF + "--data {no_metadata}", r"has no metadata.jsonl or .*12 images found"),
    "missing images": (HALF + "--data {missing_images}", r"names 1 of 12 images that do not exist "
                       r".first: 003.png.; add the files or remove"),
    "damaged images": (HALF + "--data {damaged_images}", r"6 of 100 records read cannot be used "
                       r".first: 094.png.*more than 5% is too many"),
    "no processor": (HALF + "--model {no_processor}", r"no processor at .*preprocessor_config.json"),
    "no such column": (HALF + "--caption-column words", r"no column 'words'"),
    "truncated statistics": (HALF + "--statistics {truncated_statistics}", r"damaged, truncated or"),
    "corrupt statistics": (HALF + "--statistics {corrupt_statistics}", r"the checksum differs"),
    "foreign statistics": (HALF + "--model {vit} --statistics {statistics}", r"of another model"),
    # masks
    "corrupt masks": ("masks show {corrupt_masks}", r"is damaged.*make or copy it again"),
    "truncated masks": ("masks verify {truncated_masks} {xvlm}", r"damaged or truncated"),
    "no masks": ("masks show {noise}", r"noise.bin is no mask file"),
    "a model as masks": ("masks show {xvlm}/model.safetensors", r"holds no masks .perhaps a check"),
    "no such file": ("masks diff {masks} {empty}/x", r"is no file; give the path of a mask file"),
    "another structure": ("masks apply {masks} {vit} --out {out}", r"these masks .adapter 'xvlm'. "
                          r"have none for 'vision.0.attention.output'|made for a model of this str"),
    "verify another": ("masks verify {masks} {vit}", r"use masks made for a model of this structure"),
    "no published masks": ("masks import {noise} {xvlm} --out {out}", r"nothing in it was executed"),
    # output
    "existing folder": (HALF + "--out {taken}", r"folder .*taken exists and is not empty; give"),
    "a file": (HALF + "--out {noise}", r"noise.bin is a file; give the path of a folder"),
    "below a file": (HALF + "--out {noise}/out", r"cannot write .*noise.bin.*; nothing was written"),
    "no output": ("prune --model {xvlm} --sparsity 0.5", r"no out given; pass --out"),
    "apply over a folder": ("masks apply {masks} {xvlm} --out {taken}", r"is not empty; give another"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, models, photos, pruned) -> dict[str, Path]:
    return bad_world.make(tmp_path_factory.mktemp("bad"), models, photos, pruned)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake(vlp: Command, world: dict[str, Path], tmp_path: Path, case: str) -> None:
    words, message = CASES[case]
    before = bad_world.listing(world["taken"].parent)
    arguments = [word.format(**world, out=tmp_path / "out") for word in words.split()]
    result = vlp(*arguments, code=2)
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "one line, and no warning that contradicts it"
    assert list(tmp_path.iterdir()) == [], "neither the folder nor a temporary or a checkpoint"
    assert bad_world.listing(world["taken"].parent) == before


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """The operating system refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (500, HALF),  # the checkpoint does not fit
        (3000, MAGNITUDE + "--model {xvlm}"),  # the masks do not fit
        (20_000, MAGNITUDE + "--model {xvlm} --save-model"),  # the model does not fit
        (20_000, "masks apply {masks} {xvlm} --out {out}"),
        (3000, "masks invert {masks} --out {out}"),
    ],
)
def test_a_full_disk(vlp, world, tmp_path, size, words) -> None:
    arguments = [word.format(**world, out=tmp_path / "out") for word in words.split()]
    with disk_of(size):
        result = vlp(*arguments, code=2)
    assert "no space left on the disk" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_resumed_from_and_stays(vlp, world, tmp_path) -> None:
    checkpoint = tmp_path / "out.checkpoint"
    checkpoint.write_bytes(world["truncated_statistics"].read_bytes())
    arguments = [word.format(**world, out=tmp_path / "out") for word in HALF.split()]
    result = vlp(*arguments, "--resume", code=2)
    assert "delete it and run the pass from the start" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoint"]


def test_a_batch_without_an_attention_mask(xvlm: Path) -> None:
    import torch

    model = XvlmForPretraining.from_pretrained(xvlm)
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "input_ids": torch.ones(2, 4).long()}
    with pytest.raises(BatchError, match="has no attention_mask .*padding=True, which returns one"):
        prune(model, [batch], sparsity=0.5)


def test_masks_that_do_not_fit_leave_the_model_alone(vlp, world, tmp_path) -> None:
    before = load_file(world["vit"] / "model.safetensors")
    vlp("masks", "apply", world["masks"], world["vit"], "--out", tmp_path / "o", code=2)
    after = load_file(world["vit"] / "model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)


def test_a_bug_is_one_line_with_another_exit_code(vlp, world, monkeypatch) -> None:
    def broken(path: object) -> Masks:
        raise KeyError("surprise")

    monkeypatch.setattr(Masks, "load", broken)
    result = vlp("masks", "show", world["masks"], code=70)
    assert "unexpected KeyError: 'surprise'" in result.stderr
    assert "VLP_TRACEBACK=1" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: out of memory; give a smaller --batch-size"),
        (RuntimeError("CUDA out of memory. Tried"), "error: out of memory; give a smaller"),
        (PermissionError(13, "Permission denied", "/x"), "error: Permission denied: /x"),
    ],
)
def test_errors_of_the_system(vlp, world, monkeypatch, error, message) -> None:
    def failing(path: object) -> Masks:
        raise error

    monkeypatch.setattr(Masks, "load", failing)
    assert vlp("masks", "show", world["masks"], code=2).stderr.startswith(message)
