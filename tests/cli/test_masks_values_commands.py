"""`vlp masks` on files that bring new weights."""

from __future__ import annotations

import re
from pathlib import Path

import doubling
import pytest
import torch
from safetensors.torch import load_file
from vlp_command import Command, command

from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.masks.masks import Masks

PATH = "text_encoder.bert.encoder.layer.1.intermediate.dense.weight"
NAME = "fusion.0.ffn.fc1"


@pytest.fixture(scope="module")
def masks(tmp_path_factory, xvlm: Path, photos: Path) -> Path:
    out = tmp_path_factory.mktemp("doubled") / "out"
    with doubling.registered():
        command("prune", "--model", xvlm, "--method", "doubling", "--sparsity", "0.75",
                "--data", photos, "--out", out, "--device", "cpu")  # fmt: skip
    return out / "masks-0.75.safetensors"


def test_show_says_that_they_are_there_and_how_large(vlp: Command, masks) -> None:
    text = vlp("masks", "show", masks).stdout

    size = 4 * Masks.load(masks).kept / 1024
    assert f"{size:.1f} KiB of new weights" in text.splitlines()[0]
    assert "apply --keep-weights leaves them out" in text


def test_apply_writes_them_or_leaves_what_is_there(vlp, masks, xvlm, tmp_path) -> None:
    text = vlp("masks", "apply", masks, xvlm, "--out", tmp_path / "new").stdout
    assert "the others were given new values" in text
    text = vlp("masks", "apply", masks, xvlm, "--out", tmp_path / "old", "--keep-weights").stdout
    assert "the others were left as they are" in text

    dense = load_file(xvlm / "model.safetensors")[PATH]
    mask = Masks.load(masks)[NAME]
    for folder, factor in (("new", 2), ("old", 1)):
        found = load_file(tmp_path / folder / "model.safetensors")[PATH]
        assert torch.equal(found, torch.where(mask, factor * dense, 0))
        vlp("masks", "verify", masks, tmp_path / folder)


def test_a_fine_tuned_model_is_overwritten_with_a_warning(vlp, masks, xvlm, tmp_path) -> None:
    model = XvlmForPretraining.from_pretrained(xvlm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")

    words = ("masks", "apply", masks, tmp_path / "tuned", "--out")
    warned = vlp(*words, tmp_path / "new").stderr
    assert "computed from other weights than the model's" in warned
    assert "--keep-weights" in warned
    assert vlp(*words, tmp_path / "old", "--keep-weights").stderr == ""


def test_diff_compares_them_where_both_bring_some(vlp, masks, tmp_path) -> None:
    found = Masks.load(masks)
    halved = {name: values / 2 for name, values in found.new_values.items()}
    Masks(found.packed, found.manifest, halved).save(tmp_path / "halved")
    Masks(found.packed, found.manifest).save(tmp_path / "without")

    same = vlp("masks", "diff", masks, masks).stdout
    assert re.search(r"^modality .* new weights apart$", same, re.MULTILINE)
    assert re.search(r"^all .* 0\.0000%$", same, re.MULTILINE)
    half = vlp("masks", "diff", masks, tmp_path / "halved").stdout
    assert len(re.findall(r" 50\.0000%$", half, re.MULTILINE)) == 4
    only = vlp("masks", "diff", masks, tmp_path / "without").stdout
    assert f"only {masks} brings new weights" in only
    assert "apart" not in only


def test_export_says_what_is_lost_and_import_brings_the_masks_back(vlp, masks, xvlm, tmp_path):
    told = vlp("masks", "export", masks, xvlm, "--out", tmp_path / "masks.pth").stderr
    assert re.search(r"warning: left out [\d.]+ KiB of new weights, for the [\d,]+ kept", told)

    vlp("masks", "import", tmp_path / "masks.pth", xvlm, "--out", tmp_path / "back")
    back, found = Masks.load(tmp_path / "back"), Masks.load(masks)
    assert back.new_values is None
    assert back == Masks(found.packed, found.manifest)


def test_invert_drops_them(vlp, masks, tmp_path) -> None:
    told = vlp("masks", "invert", masks, "--out", tmp_path / "inverted").stderr

    assert "left out: " in told
    assert Masks.load(tmp_path / "inverted").new_values is None
