"""`vlp prune`: from a model and a folder of photos to a folder of results."""

from __future__ import annotations

import csv
import html
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.jobs.recipes import load_recipe, packaged_recipes
from vlp_plugins.masks.masks import Masks

SPARSITIES = ("0.63", "0.75", "0.9")


def masks_in(folder: Path) -> dict[str, Masks]:
    return {p.name: Masks.load(p) for p in sorted(folder.glob("masks-*.safetensors"))}


def test_the_folder_of_results(pruned: Path) -> None:
    assert sorted(path.name for path in pruned.iterdir()) == [
        "layers.csv",
        *(f"masks-{s}.safetensors" for s in SPARSITIES),
        *(f"model-{s}" for s in SPARSITIES),
        "recipe.yaml",
        "report.html",
        "statistics.safetensors",
    ]
    assert not list(pruned.parent.glob("*.checkpoint*"))


def test_the_terminal_shows_counts_and_facts(vlp, xvlm, tmp_path) -> None:
    words = ("--model", xvlm, "--method", "omp", "--sparsity", "0.5")
    result = vlp("prune", *words, "--out", tmp_path / "o")
    assert re.search(r"0.5 +all +50.0000%", result.stdout)
    assert "peak memory of the process:" in result.stdout
    assert "calibration data: none needed" in result.stdout
    assert result.stdout.endswith(f"written: {tmp_path / 'o'}\n")
    assert result.stderr == ""


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_removed_are_exactly_as_many_as_asked_of_each_modality(pruned, sparsity) -> None:
    counts = Masks.load(pruned / f"masks-{sparsity}.safetensors").counts()
    assert set(counts.by_modality) == {"vision", "text", "fusion"}
    for count in counts.by_modality.values():
        assert count.removed == int(float(sparsity) * count.total)


def test_layers_csv_has_every_layer_with_the_counts_of_the_masks(pruned) -> None:
    with (pruned / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = Masks.load(pruned / "masks-0.75.safetensors").counts().by_weight
    assert [row["name"] for row in rows] == list(counts)
    assert [int(row["kept_0.75"]) for row in rows] == [c.kept for c in counts.values()]
    assert [int(row["elements"]) for row in rows] == [c.total for c in counts.values()]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_pruned_models_load_and_are_as_sparse_as_the_masks(vlp, pruned, sparsity) -> None:
    folder, masks = pruned / f"model-{sparsity}", pruned / f"masks-{sparsity}.safetensors"
    assert isinstance(XvlmForPretraining.from_pretrained(folder), XvlmForPretraining)
    assert "ok: all" in vlp("masks", "verify", masks, folder).stdout
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "preprocessor_config.json").is_file()


def test_every_pruned_model_comes_from_the_dense_weights(pruned, xvlm) -> None:
    """The masks are not nested: what 0.9 keeps must not have been zeroed by 0.63."""
    dense = load_file(xvlm / "model.safetensors")
    for sparsity in SPARSITIES:
        state = load_file(pruned / f"model-{sparsity}" / "model.safetensors")
        for name, tensor in state.items():
            assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0]), name


def test_the_original_model_is_left_as_it_was(pruned, vlp, xvlm) -> None:
    result = vlp("masks", "verify", pruned / "masks-0.63.safetensors", xvlm, code=1)
    assert "Not zero where the mask removes" in result.stdout


def test_a_yaml_recipe_does_the_same_as_the_options(vlp, pruned, xvlm, photos, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {xvlm}\nmethod: multiflow\nsparsity: [0.63, 0.75, 0.9]\nout: {tmp_path / 'a'}\n"
        f"data: {{source: {photos}, batch_size: 3}}\ndevice: cpu\n"
    )
    vlp("prune", recipe)
    assert masks_in(tmp_path / "a") == masks_in(pruned)

    vlp("prune", "--sparsity", "0.75", recipe, "--out", tmp_path / "b")
    assert list(masks_in(tmp_path / "b")) == ["masks-0.75.safetensors"]
    assert masks_in(tmp_path / "b").items() <= masks_in(pruned).items()


def test_the_written_recipe_repeats_the_run_bit_for_bit(vlp, pruned, tmp_path) -> None:
    recipe = load_recipe(pruned / "recipe.yaml")
    assert recipe.out == str(pruned)
    assert recipe.sparsity == (0.63, 0.75, 0.9)
    vlp("prune", pruned / "recipe.yaml", "--out", tmp_path / "again")
    assert masks_in(tmp_path / "again") == masks_in(pruned)


def test_the_reports_command_repeats_the_run_bit_for_bit(vlp, pruned, tmp_path) -> None:
    page = (pruned / "report.html").read_text()
    line = html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[-1])
    words = shlex.split(line)
    assert words[:2] == ["vlp", "prune"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    vlp(*words[1:])
    assert masks_in(tmp_path / "again") == masks_in(pruned)


def test_a_recipe_of_the_paper(vlp, xvlm, photos, tmp_path) -> None:
    vlp("prune", "paper/multiflow-xvlm", "--model", xvlm, "--data", photos, "--out", tmp_path / "o")
    found = masks_in(tmp_path / "o")
    assert list(found) == [f"masks-{s}.safetensors" for s in SPARSITIES]
    assert found["masks-0.9.safetensors"].manifest.parameters["variant"] == "published"


def test_recipes_of_the_package_are_listed(vlp) -> None:
    listed = vlp("prune", "--recipes").output
    for name, path in packaged_recipes().items():
        assert f"{name} " in listed
        assert str(path).startswith(listed.splitlines()[-1].removeprefix("files: "))
    assert re.search(r"paper/omp-xvlm +One-shot magnitude pruning \(OMP\) on X-VLM\n", listed)


def test_budgets_per_modality_and_parameters(vlp, xvlm, photos, tmp_path) -> None:
    out = tmp_path / "out"
    vlp(
        "prune", "--model", xvlm, "--sparsity", "vision=0.5,text=0.8,fusion=0", "0.25",
        "--parameter", "edges=false", "nodes=true", "--data", photos, "--out", out,
    )  # fmt: skip
    found = masks_in(out)
    assert sorted(found) == [
        "masks-0.25.safetensors",
        "masks-vision=0.5,text=0.8,fusion=0.safetensors",
    ]
    counts = found["masks-vision=0.5,text=0.8,fusion=0.safetensors"].counts().by_modality
    assert {name: round(count.sparsity, 2) for name, count in counts.items()} == {
        "vision": 0.5,
        "text": 0.8,
        "fusion": 0,
    }
    assert load_recipe(out / "recipe.yaml").parameters == {"edges": False, "nodes": True}


def test_a_pattern_brings_its_own_sparsity(vlp, xvlm, tmp_path) -> None:
    out = tmp_path / "out"
    vlp("prune", "--model", xvlm, "--method", "omp", "--allocation", "keep=2,of=4", "--out", out)
    assert masks_in(out)["masks-0.5.safetensors"].sparsity == 0.5
    assert yaml.safe_load((out / "recipe.yaml").read_text())["allocation"] == "keep=2,of=4"


def test_a_pattern_stands_in_the_place_of_a_sparsity(vlp, xvlm, tmp_path) -> None:
    words = ("prune", "--model", xvlm, "--method", "omp", "--out", tmp_path / "out")
    result = vlp(*words, "--sparsity", "0.5", "keep=2,of=4", code=2)
    assert "give it alone" in result.stderr
    vlp(*words, "--sparsity", "keep=2,of=4")
    assert masks_in(tmp_path / "out")["masks-0.5.safetensors"].sparsity == 0.5
