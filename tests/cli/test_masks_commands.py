"""`vlp masks`: what each command prints, writes and exits with."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlp_command import Command

from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.pruning import prune


@pytest.fixture(scope="module")
def masks(pruned: Path) -> Path:
    return pruned / "masks-0.75.safetensors"


def test_show(vlp: Command, masks: Path) -> None:
    text = vlp("masks", "show", masks).stdout
    assert text.startswith("Masks(multiflow, ")
    assert "adapter 'xvlm'" in text
    assert "batches 4, samples 12" in text
    assert re.search(r"all +75.0000%", text)


def test_apply_makes_a_model_that_verify_accepts(vlp, masks, xvlm, tmp_path) -> None:
    text = vlp("masks", "apply", masks, xvlm, "--out", tmp_path / "sparse").stdout
    assert "75.0000% of the prunable weights are zero" in text
    vlp("masks", "verify", masks, tmp_path / "sparse")
    assert (tmp_path / "sparse" / "tokenizer.json").is_file()
    vlp("masks", "apply", masks, xvlm, "--out", tmp_path / "sparse", code=2)


def test_masks_fit_a_fine_tuned_model(vlp, masks, xvlm, tmp_path) -> None:
    model = XvlmForPretraining.from_pretrained(xvlm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    vlp("masks", "apply", masks, tmp_path / "tuned", "--out", tmp_path / "tuned_sparse")
    vlp("masks", "verify", masks, tmp_path / "tuned_sparse")


def test_verify_exits_with_1_if_a_weight_came_back(vlp, masks, pruned, tmp_path) -> None:
    folder = tmp_path / "revived"
    folder.mkdir()
    for path in (pruned / "model-0.75").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    name = "text_encoder.bert.encoder.layer.1.intermediate.dense.weight"
    state[name].view(-1)[(state[name] == 0).flatten().nonzero()[0]] = 1.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    text = vlp("masks", "verify", masks, folder, code=1).stdout
    assert re.search(rf"fusion.0.ffn.fc1 +{name} +1 +\d", text)


def test_diff_tells_modalities_apart(vlp, pruned, masks) -> None:
    same = vlp("masks", "diff", masks, masks).stdout
    assert re.search(r"all +[\d,]+ +0 +100.0000% +1.0000", same)
    other = vlp("masks", "diff", masks, pruned / "masks-0.9.safetensors").stdout
    assert {line.split()[0] for line in other.splitlines() if line} == {
        "modality",
        "vision",
        "text",
        "fusion",
        "all",
    }


def test_inverting_twice_gives_the_same_masks(vlp, masks, tmp_path) -> None:
    text = vlp("masks", "invert", masks, "--out", tmp_path / "once.safetensors").stdout
    assert "sparsity 25.0000%" in text
    vlp("masks", "invert", tmp_path / "once.safetensors", "--out", tmp_path / "twice.safetensors")
    assert Masks.load(tmp_path / "twice.safetensors") == Masks.load(masks)
    assert "inverted" in vlp("masks", "show", tmp_path / "once.safetensors").stdout


def test_export_and_import_give_the_same_masks(vlp, masks, xvlm, tmp_path) -> None:
    vlp("masks", "export", masks, xvlm, "--out", tmp_path / "masks.pth")
    state = torch.load(tmp_path / "masks.pth", weights_only=True)
    assert all(key.endswith("_pruning_mask") for key in state)
    assert "vision_encoder.encoder.layers.0.mlp.fc1.weight_pruning_mask" in state

    vlp("masks", "import", tmp_path / "masks.pth", xvlm, "--out", tmp_path / "back.safetensors")
    assert Masks.load(tmp_path / "back.safetensors") == Masks.load(masks)


def test_masks_of_any_model_by_module_adapter(vlp, models, tmp_path) -> None:
    clip, module = models / "chinese_clip", ("--adapter", "module")
    vlp("prune", "--model", clip, *module, "--method", "lamp", "--sparsity", "0.5",
        "--out", tmp_path / "o")  # fmt: skip
    masks = tmp_path / "o" / "masks-0.5.safetensors"
    vlp("masks", "verify", masks, clip, code=1)
    vlp("masks", "apply", masks, clip, "--out", tmp_path / "sparse")
    vlp("masks", "verify", masks, tmp_path / "sparse")
    vlp("masks", "verify", masks, tmp_path / "sparse", *module)


@pytest.mark.parametrize("name", ["show", "apply", "verify", "diff", "invert", "import", "export"])
def test_every_command_explains_itself(vlp, name) -> None:
    assert vlp("masks", name, "--help").stdout.startswith("Usage:")


def test_nothing_is_overwritten(vlp, masks, xvlm, tmp_path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    for words in (["invert", masks], ["export", masks, xvlm], ["import", masks, xvlm]):
        result = vlp("masks", *words, "--out", target, code=2)
        assert result.stderr.startswith("error: ")
        assert "exists already" in result.stderr
    assert target.read_text() == "precious"


def test_masks_of_a_faulty_version_are_told_by_show_and_verify(vlp, models, tmp_path) -> None:
    model, adapter = load_model(str(models / "vit"), device="cpu")
    masks = prune(model, method="omp", sparsity=0.5, adapter=adapter)
    old = replace(masks.manifest, made_by="vlp_plugins 0.1.0", method="taylor")
    Masks(dict(masks.packed), old).save(tmp_path / "old.safetensors")
    masks.save(tmp_path / "new.safetensors")
    words = "warning: vlp_plugins 0.1.0 made these masks, and may have made wrong ones"
    assert words in vlp("masks", "show", tmp_path / "old.safetensors").stdout
    assert "warning" not in vlp("masks", "show", tmp_path / "new.safetensors").output
    place = (models / "vit", "--device", "cpu")
    assert words in vlp("masks", "verify", tmp_path / "old.safetensors", *place, code=1).stderr
    (tmp_path / "trial.json").touch()
    assert "optimize_mode" in vlp("masks", "show", tmp_path / "old.safetensors").stdout
