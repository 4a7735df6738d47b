"""`vlp masks apply --sparse`, and all that other commands do with such a folder."""

from __future__ import annotations

import re

import pytest
from vlp_command import Command

from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.sparse import SPARSE_FILE, load_sparse


@pytest.fixture(scope="module")
def masks(pruned):
    return pruned / "masks-0.75.safetensors"


def test_a_sparse_folder_is_a_model_to_every_command(vlp: Command, masks, xvlm, photos, tmp_path):
    folder = tmp_path / "small"
    text = vlp("masks", "apply", masks, xvlm, "--sparse", "--out", folder).stdout
    assert re.search(r"weights take 9.0 KiB instead of 32.0 KiB, the whole file \d", text)
    assert (folder / SPARSE_FILE).is_file()
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "model.safetensors").exists()

    vlp("masks", "verify", masks, folder)
    assert "adapter 'xvlm'" in vlp("inspect", folder).stdout
    vlp(
        "prune", "--model", folder, "--method", "multiflow", "--sparsity", "0.9", "--data", photos,
        "--batch-size", "3", "--out", tmp_path / "again", "--device", "cpu",
    )  # fmt: skip
    assert Masks.load(tmp_path / "again" / "masks-0.9.safetensors").sparsity > 0.89


@pytest.mark.parametrize("family", ["xvlm", "blip", "vit", "clip", "siglip", "chinese_clip"])
def test_every_family_comes_back_with_its_ties(vlp: Command, family, models, tmp_path):
    from vlp_plugins.pruning import prune

    adapter = "module" if family == "chinese_clip" else None
    model, known = load_model(str(models / family), adapter=adapter, device="cpu")
    found = prune(model, adapter=known, method="omp", sparsity=0.75)
    found.save(tmp_path / "masks.safetensors")
    out = tmp_path / "small"

    vlp("masks", "apply", tmp_path / "masks.safetensors", models / family, "--sparse", "--out", out)

    found.apply(model, known)
    again, recalled = load_sparse(out)
    assert (type(again), type(recalled)) == (type(model), type(known))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert value.equal(again.state_dict()[name])
    assert again.num_parameters() == model.num_parameters()
