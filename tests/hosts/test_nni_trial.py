"""One trial: pruned as drawn, measured, fine-tuned, reported, and kept whole or not at all."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from nni_trial_examples import Told, command, masks_of, recipe_in, save_world
from safetensors.torch import load_file

from vlp_adapters.blip import BlipForPretraining
from vlp_plugins.hosts.nni.best import TrialRecord
from vlp_plugins.hosts.nni.drawn_settings import DRAWN, TrialSettings, overlay
from vlp_plugins.hosts.nni.trial import run_trial
from vlp_plugins.jobs.preparation import resolve_names
from vlp_plugins.jobs.prune import run
from vlp_plugins.jobs.recipes import KEYS, DataRecipe, Recipe, load_recipe
from vlp_plugins.runtime.errors import (
    DataError,
    NonFiniteError,
    RecipeError,
    UnknownNameError,
    UnsupportedError,
)

SETTINGS = TrialSettings(pairs=6)
RECALLS = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Recipe:
    return recipe_in(world, tmp_path / "trials")


@pytest.mark.parametrize(
    ("drawn", "changes"),
    [
        ({"pruner": "multiflow", "sparsity": 0.75}, {"sparsity": (0.75,)}),
        (
            {"pruner": {"_name": "multiflow", "id": True}, "data.batches": 8},
            {"method": "id*multiflow", "batches": 8},
        ),
        ({"pruner": "omp", "id": False, "floor": 0.1}, {"method": "omp", "floor": 0.1}),
        ({"allocation": {"_name": "row"}}, {"allocation": "row"}),
        (
            {"pruner": {"_name": "chita", "lambda": 1e-3, "rows": 1}},
            {"method": "chita", "parameters": {"lambda": 1e-3, "rows": 1}},
        ),
    ],
    ids=["multiflow", "id", "omp", "allocation", "chita"],
)
def test_the_masks_are_those_of_vlp_prune(recipe, tmp_path, drawn, changes) -> None:
    trial = Told(drawn)
    record = run_trial(recipe, SETTINGS, trial)

    data = replace(recipe.data, batches=changes.get("batches", 2))
    changes = {key: value for key, value in changes.items() if key != "batches"}
    alone = replace(recipe, **changes, data=data, out=str(tmp_path / "alone"))
    run(alone)
    folder = tmp_path / "trials" / "exp" / "one"
    assert masks_of(folder) == masks_of(tmp_path / "alone")
    assert replace(load_recipe(folder / "recipe.yaml"), out=alone.out) == alone
    assert record.method == alone.method
    assert (len(trial.reported), trial.ended) == (1, [record.final])


def test_what_is_reported(recipe, tmp_path) -> None:
    settings = replace(SETTINGS, finetune_steps=5, report_every=2, learning_rate=1e-2)
    trial = Told({"pruner": "omp"}, number=3)
    record = run_trial(recipe, settings, trial)

    assert list(record.results) == [0, 2, 4, 5]
    assert trial.reported == list(record.results.values())
    assert trial.ended == [record.results[5]]
    assert list(record.final) == ["default", *RECALLS]
    assert record.final["default"] == pytest.approx(sum(record.final[r] for r in RECALLS) / 6)
    assert (record.metric, record.number, record.sparsity) == ("recall", 3, 0.5)
    folder = tmp_path / "trials" / "exp" / "one"
    assert TrialRecord.load(folder) == record
    recalls = " → ".join(f"{record.results[step]['default']:.1f}%" for step in (0, 5))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f'<dt>Mean recall</dt><dd class="value">{recalls}</dd>' in page
    assert '<a href="trial.json">' in page


def test_fine_tuning_makes_the_loss_smaller_and_keeps_the_zeros(recipe, world, tmp_path) -> None:
    settings = replace(SETTINGS, test=str(world / "train"), metric="loss", report_every=20)
    drawn = {"finetune_steps": 20, "learning_rate": 1e-2}
    record = run_trial(replace(recipe, save_model=True), settings, Told(drawn))

    assert list(record.results) == [0, 20]
    assert record.results[20]["loss"] < record.results[0]["loss"] - 0.1
    assert record.final["default"] == -record.final["loss"]
    folder = tmp_path / "trials" / "exp" / "one"
    trained = BlipForPretraining.from_pretrained(folder / "model-finetuned")
    assert masks_of(folder).verify(trained) == []
    before = load_file(folder / "model-0.5" / "model.safetensors")
    after = load_file(folder / "model-finetuned" / "model.safetensors")
    assert not torch.equal(before["itm_head.weight"], after["itm_head.weight"])


def test_a_trial_gives_the_same_figures_every_time(recipe) -> None:
    settings = replace(SETTINGS, metric="loss", finetune_steps=2)
    state = torch.get_rng_state()
    one = run_trial(recipe, settings, Told())
    torch.manual_seed(99)
    two = run_trial(recipe, settings, Told(name="two"))

    assert one.results == two.results
    torch.set_rng_state(state)


def test_new_weights_of_chita_are_measured(recipe) -> None:
    settings = replace(SETTINGS, metric="loss")
    chita = run_trial(recipe, settings, Told({"pruner": "chita", "lambda": 1e-4}))
    other = run_trial(recipe, settings, Told({"pruner": "chita", "lambda": 10.0}, name="two"))
    assert chita.final["loss"] != other.final["loss"]


@pytest.mark.parametrize(
    ("drawn", "settings", "error", "message"),
    [
        ({"pruner": "multiflw"}, {}, UnknownNameError, "did you mean 'multiflow'"),
        ({"pruner": "omp", "lambda": 1.0}, {}, UnknownNameError, "'omp' has no parameter 'lambda'"),
        ({"finetune_steps": 1, "learning_rate": 0.0}, {}, RecipeError, "must be above 0, not 0"),
        (
            {"learning_rate": 1e18},
            {"finetune_steps": 3, "metric": "loss", "report_every": 1},
            NonFiniteError,
            "infinite|not finite|nan|inf",
        ),
        ({"data.batches": 10}, {}, DataError, "no pairs after the 10 batches of 3"),
        ({}, {"test": "./nowhere"}, DataError, "data ./nowhere does not exist"),
    ],
)
def test_a_trial_that_fails_leaves_nothing(
    recipe, tmp_path, drawn, settings, error, message
) -> None:
    trial = Told(drawn)
    with pytest.raises(error, match=message):
        run_trial(recipe, replace(SETTINGS, **settings), trial)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert trial.ended == []


def test_a_model_that_neither_retrieves_nor_has_a_loss_says_so(recipe, world, tmp_path) -> None:
    vit = replace(recipe, model=str(world / "vit"), method="omp")
    with pytest.raises(UnsupportedError, match="ViTModel has no classifier"):
        run_trial(vit, SETTINGS, Told())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_read_is_never_measured_on(recipe) -> None:
    everything = replace(recipe, data=replace(recipe.data, batches=None))
    with pytest.raises(RecipeError, match="what is read is not measured on: give --test"):
        run_trial(everything, SETTINGS, Told())
    with pytest.raises(UnsupportedError, match="fine-tuning takes weights in float32"):
        run_trial(replace(recipe, dtype="bfloat16"), SETTINGS, Told({"finetune_steps": 1}))


BASE = Recipe(method="id*multiflow", parameters={"edges": False}, sparsity=(0.5,))


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ({}, BASE),
        ({"id": False}, replace(BASE, method="multiflow")),
        ({"pruner": "id*multiflow"}, BASE),
        ({"method": "omp"}, replace(BASE, method="omp", parameters={})),
        ({"nodes": False}, replace(BASE, parameters={"edges": False, "nodes": False})),
        (
            {"sparsity.vision": 0.5, "sparsity.text": 0.8},
            replace(BASE, sparsity=({"vision": 0.5, "text": 0.8},)),
        ),
        ({"data.batches": 7}, replace(BASE, data=DataRecipe(batches=7))),
        ({"parameters.edges": True}, replace(BASE, parameters={"edges": True})),
    ],
)
def test_what_is_drawn_wins(drawn, expected) -> None:
    assert overlay(BASE, TrialSettings(), drawn) == (expected, TrialSettings())


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"pruner": "omp", "method": "omp"}, "pruner and method are the same"),
        ({"pruner": {"lambda": 1}}, "pruner must be a name, not {'lambda': 1}; where one"),
        ({"pruner": {"_name": "chita", "lambda": 1}, "lambda": 2}, "'lambda' is drawn twice"),
        ({"sparsity": 0.5, "sparsity.text": 0.8}, "'sparsity' is drawn twice"),
        ({"out": "x"}, "out can be set in the recipe only, not by a tuner; .* may draw pruner"),
        ({"data": "photos/"}, "data can be set in the recipe only"),
        ({"data": {"source": "photos/"}}, "data.source can be set in the recipe only"),
        ({"data": {"_name": "photos/"}}, "data can be set in the recipe only"),
        ({"pruner": {"_name": "omp", "model": "m"}}, "model can be set in the recipe only"),
        ({"parameters": {"keep_in": "../x"}}, "keep_in '../x' is not a plain word"),
        ({"keep_in": "/etc/passwd"}, "keep_in '/etc/passwd' is not a plain word"),
        ({"keep_in": ["weights.bin"]}, "keep_in 'weights.bin' is not a plain word"),
        ([1, 2], r"given values by key, not \[1, 2\]"),
        ("drawn", "given values by key, not 'drawn'"),
        ({"id": "on"}, "id must be true or false, not 'on'"),
        ({"sparsity": 75}, "did you mean 0.75"),
        ({"sparsity": [0.5, 0.6]}, "a trial makes one set of masks, but the recipe has 2"),
        ({"seed": 1.5}, "search space: seed must be a whole number from 0 on, not 1.5"),
        ({"finetune_steps": 10.5}, "finetune_steps must be a whole number from 0 on, not 10.5"),
        ({"data.batchsize": 1}, "unknown key 'batchsize' .did you mean 'batch_size'"),
    ],
)
def test_what_must_not_be_drawn(drawn, message) -> None:
    with pytest.raises(RecipeError, match=message):
        overlay(replace(BASE, method="chita"), TrialSettings(), drawn)


def test_what_may_be_drawn_is_a_closed_list() -> None:
    """Every key of a recipe is drawn or refused; what names or writes a file is refused."""
    keys = {f"data.{each.name}" for each in fields(DataRecipe)} | (KEYS - {"data"})
    refused = keys - set(DRAWN)
    assert refused == {
        *("model", "adapter", "processor", "statistics", "id_profile", "out", "device"),
        *("save_model", "keep_statistics", "checkpoint_every", "memory_budget"),
        *(f"data.{name}" for name in ("source", "split", "image_column", "caption_column")),
        "data.workers",
    }
    for key in refused:
        with pytest.raises(RecipeError, match=f"search space: {key} can be set in the recipe only"):
            overlay(BASE, TrialSettings(), {key: 1})
    assert set(DRAWN) - keys == {"pruner", "id", "finetune_steps", "learning_rate"}
    page = (Path(__file__).parents[2] / "docs" / "nni.md").read_text(encoding="utf-8")
    listed = page.split("What may be drawn is a closed list:")[1].split(";")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == set(DRAWN)


def test_a_trial_refuses_what_is_not_for_a_tuner(recipe, world, tmp_path) -> None:
    for key in ("model", "processor", "statistics", "data.source"):
        trial = Told({key: str(world / "vit")})
        with pytest.raises(RecipeError, match=f"{key} can be set in the recipe only"):
            run_trial(recipe, SETTINGS, trial)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_whole_numbers_of_a_tuner_may_have_a_point() -> None:
    drawn = {"pruner": "chita++", "rounds": 2.0, "seed": 3.0, "data.batches": 8.0}
    trial, settings = overlay(BASE, TrialSettings(), drawn | {"finetune_steps": 10.0})
    assert (trial.seed, trial.data.batches, settings.finetune_steps) == (3, 8, 10)
    assert resolve_names(trial)[0].parameters["rounds"] == 2


def test_by_hand_the_recipe_decides(world, tmp_path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text(
        f"model: {world / 'blip'}\nsparsity: 0.5\nout: {tmp_path / 'trials'}\ndevice: cpu\n"
        f"data: {{source: {world / 'train'}, batch_size: 3, batches: 2}}\n"
    )
    result = command("nni-trial", path, "--method", "omp", "--finetune-steps", "2")

    assert "no NNI experiment: nothing is drawn" in result.stderr
    assert "omp: 50.0000% of the prunable weights are removed" in result.stdout
    folder = tmp_path / "trials" / "STANDALONE" / "STANDALONE"
    assert TrialRecord.load(folder).settings["finetune_steps"] == 2
    assert result.stdout.endswith(f"written: {folder}\n")
    assert "exists and is not empty" in command("nni-trial", path, code=2).stderr


def test_without_nni_it_says_what_to_install(monkeypatch, tmp_path) -> None:
    for module in [name for name in sys.modules if name.startswith("vlp_plugins.hosts.nni")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nni", None)
    (tmp_path / "r.yaml").write_text("model: m\n")
    for words in ((), ("--check", tmp_path / "r.yaml")):
        result = command("nni-trial", tmp_path / "r.yaml", *words, code=2)
        assert 'pip install "vlp-plugins[nni]"' in result.stderr


def test_without_nni_no_command_of_it_is_a_traceback() -> None:
    program = "import sys; sys.modules['nni'] = None; from vlp_plugins.cli import main; main()"
    for words in (["nni-trial"], ["nni-best", "trials", "--out", "best"]):
        line = [sys.executable, "-c", program, *words]
        ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2
        assert 'pip install "vlp-plugins[nni]"' in ended.stderr
        assert ended.stderr.startswith("error: ")
        assert ended.stderr.count("\n") == 1
