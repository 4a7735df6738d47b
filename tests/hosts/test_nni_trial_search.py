"""An experiment is checked before it starts: search space, tuner, and what its trials need."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from nni import parameter_expressions
from nni.tools.package_utils.config_manager import get_all_algo_meta
from nni_trial_examples import Told, command, recipe_in, save_world, tiny_models

from vlp_plugins.hosts.nni import search
from vlp_plugins.hosts.nni import trial as experiment
from vlp_plugins.hosts.nni.drawn_settings import TrialSettings
from vlp_plugins.hosts.nni.search import check_experiment, draws
from vlp_plugins.hosts.nni.trial import run_trial
from vlp_plugins.jobs.preparation import prepare
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, load_recipe, packaged_recipes
from vlp_plugins.pruning import gather
from vlp_plugins.runtime.errors import RecipeError, VlpError

EXAMPLES = packaged_recipes()["nni/trial"].parent
RECIPE = Recipe(model="m", sparsity=(0.75,), data=DataRecipe("photos", batches=2), out="o")
SETTINGS = TrialSettings()
MAXIMIZE = {"optimize_mode": "maximize"}
SPACE = """
pruner:
  _type: choice
  _value:
    - _name: multiflow
    - {_name: chita, lambda: {_type: loguniform, _value: [1.0e-5, 1.0]}}
"""


CHITA = "pruner: {_type: choice, _value: [{_name: chita, %s: {_type: %s, _value: %s}}]}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Recipe:
    return recipe_in(world, tmp_path / "trials")


def check(
    folder: Path,
    space: str,
    recipe: Recipe = RECIPE,
    of_trials: TrialSettings = SETTINGS,
    **extra: Any,
) -> tuple[tuple[str, ...], int]:
    config = {
        "searchSpace": yaml.safe_load(space),
        "trialCommand": "vlp nni-trial trial.yaml",
        "trialConcurrency": 1,
        "tuner": {"name": "Random"},
        "trainingService": {"platform": "local"},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(config | extra))
    found = check_experiment(path, recipe, of_trials)
    return found.methods, found.draws


def test_the_examples_are_right(world, tmp_path) -> None:
    """From the experiment's own folder, which the paths in the recipe are relative to."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    shutil.copytree(world / "blip", tmp_path / "models" / "blip")
    shutil.copytree(world / "train", tmp_path / "photos")
    words = ["--check", tmp_path / "search.yaml", "--batch-size", 4, "--batches", 5]
    result = command("nni-trial", tmp_path / "trial.yaml", *words)
    assert result.stdout.startswith("ok: 8 draws tried, pruners id*multiflow, multiflow, wanda")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "models", "photos", "search.yaml", "trial.yaml",
    ]  # fmt: skip
    recipe = load_recipe(EXAMPLES / "trial.yaml")
    assert (recipe.sparsity, recipe.out) == ((0.75,), "trials")
    command_line = yaml.safe_load((EXAMPLES / "search.yaml").read_text())["trialCommand"]
    assert command_line.split()[:3] == ["vlp", "nni-trial", "trial.yaml"]


def test_every_alternative_and_both_ends_are_tried(recipe, tmp_path) -> None:
    space = SPACE + (
        "sparsity: {_type: uniform, _value: [0.5, 0.9]}\nid: {_type: choice, _value: [true, false]}"
    )
    enough = replace(recipe, data=replace(recipe.data, batches=7))  # to measure dimensions
    assert check(tmp_path, space, enough) == (("id*multiflow", "multiflow", "id*chita"), 5)
    drawn = list(draws(yaml.safe_load(space)))
    assert drawn[0] == {"pruner": {"_name": "multiflow"}, "sparsity": 0.5, "id": True}
    assert {"_name": "chita", "lambda": 1e-5} in [each["pruner"] for each in drawn]
    assert {"_name": "chita", "lambda": 1.0} in [each["pruner"] for each in drawn]
    assert {each["sparsity"] for each in drawn} == {0.5, 0.9}
    assert {each["id"] for each in drawn} == {True, False}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{_type: randint, _value: [1, 5]}", [1, 4]),
        ("{_type: quniform, _value: [1, 5, 1]}", [1.0, 5.0]),
        ("{_type: quniform, _value: [1, 5, 2]}", [1.0, 4.0]),
        ("{_type: quniform, _value: [1, 5, 0.5]}", [1.0, 5.0, 1.5]),
        ("{_type: qloguniform, _value: [1, 8, 2.5]}", [1.0, 7.5]),
        ("{_type: quniform, _value: [0.2, 0.6, 0.2]}", [0.2, 0.6]),
        ("{_type: uniform, _value: [1, 5]}", [1.0, 5.0, 1.5]),
        ("{_type: loguniform, _value: [1, 2]}", [1.0, 2.0, 1.5]),
        ("{_type: uniform, _value: [0.5, 5]}", [0.5, 5.0]),
        ("{_type: normal, _value: [0.5, 1]}", [0.5, -1.5, 2.5]),
        ("{_type: normal, _value: [4, 1]}", [4.0, 2.0, 6.0, 2.5]),
        ("{_type: qnormal, _value: [4, 1, 1]}", [4.0, 2.0, 6.0]),
        ("{_type: lognormal, _value: [0, 1]}", pytest.approx([1.0, 0.135335, 7.389056], rel=1e-5)),
        ("{_type: randint, _value: [3, 4]}", [3]),
        ("{_type: choice, _value: [a, b]}", ["a", "b"]),
    ],
)
def test_what_is_tried_of_a_distribution(spec, expected) -> None:
    assert [each["x"] for each in draws(yaml.safe_load(f"x: {spec}"))] == expected


@pytest.mark.parametrize("kind", ["uniform", "quniform", "loguniform", "qloguniform"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_if_all_that_is_tried_is_whole_all_that_is_drawn_is(kind, data) -> None:
    """By the formulas that NNI's tuners draw with."""
    halves = st.integers(1, 12).map(lambda number: number / 2)
    low = data.draw(halves)
    values = [low, low + data.draw(halves)] + ([data.draw(halves)] if kind[0] == "q" else [])
    tried = [each["x"] for each in draws({"x": {"_type": kind, "_value": values}})]
    state = np.random.RandomState(0)
    drawn = [float(getattr(parameter_expressions, kind)(*values, state)) for _ in range(50)]

    assert all(values[0] <= value <= values[1] for value in tried)
    if all(value.is_integer() for value in tried):
        assert all(value.is_integer() for value in drawn)
    if kind[0] == "q":
        assert set(tried) <= {round(k * values[2], 6) for k in range(40)} | set(values[:2])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "pruner: {_type: choice, _value: [omp, mulitflow]}",
            "a trial with pruner mulitflow fails: no method is called .*did you mean 'multiflow'",
        ),
        (
            "pruner: {_type: choice, _value: [chita, multiflow]}\n"
            "lambda: {_type: loguniform, _value: [1.0e-5, 1]}",
            "'multiflow' has no parameter 'lambda'; it takes .*belongs to its own: {_name: chita",
        ),
        (
            CHITA % ("lambada", "choice", "[1]"),
            "pruner chita, lambada 1 fails: method 'chita' has no parameter 'lambada'",
        ),
        ("lambda: {_type: loguniform, _value: [1e-5, 1]}", "lambda: YAML takes 1e-5 for .* 1.0e-5"),
        (
            CHITA % ("lambda", "loguniform", "[1e-5, 1]"),
            "lambda: YAML takes 1e-5 for text; write 1.0e-5",
        ),
        (
            "pruner: {_type: choice, _value: [{_name: chita}, omp]}",
            "of the alternatives of pruner all or none are written {_name",
        ),
        (
            CHITA % ("lambda", "loguniform", "[1]"),
            "must have 2 values",
        ),
        ("sparsity: {_type: uniform, _value: [0.9, 0.5]}", "must have high > low"),
        ("sparsity: {_type: uniform, _value: [0.5, 1.0]}", r"in \[0, 1\), not 1"),
        ("sparsity: {_type: unifrom, _value: [0.5, 0.6]}", "unsupported type .unifrom"),
        ("sparsity: 0.5", "is a float, expect a dict"),
        ("allocation: {_type: choice, _value: [global, modalty]}", "did you mean 'modality'"),
        (
            "learning_rate: {_type: uniform, _value: [0, 1]}\n"
            "finetune_steps: {_type: choice, _value: [9]}",
            "learning rate must be above 0",
        ),
        (CHITA % ("lambda", "uniform", "[-1, 1]"), "lambda -1.0 fails: .*lambda"),
        # Whole numbers.
        (CHITA % ("rows", "quniform", "[1, 5, 0.5]"), "rows 1.5 fails: .*rows=1.5; give a whole"),
        (CHITA % ("rows", "uniform", "[1, 5]"), "rows 1.5 fails: .*rows=1.5; give a whole"),
        (CHITA % ("rows", "quniform", "[1, 4.6, 1]"), "rows=4.6; give a whole"),
        (CHITA % ("block_size", "normal", "[100, 1]"), "block_size=98.5; give a whole"),
        (
            "seed: {_type: uniform, _value: [0, 9]}",
            "seed must be a whole number from 0 on, not 0.5",
        ),
        ("data.batches: {_type: quniform, _value: [1, 9, 0.5]}", "batches must be a whole .* 1.5"),
        (
            "finetune_steps: {_type: loguniform, _value: [1, 100]}",
            "finetune_steps must be a whole number from 0 on, not 1.5",
        ),
        # What is not for a tuner.
        ("model: {_type: choice, _value: [a, b]}", "model can be set in the recipe only"),
        (
            "data.source: {_type: choice, _value: [a, b]}",
            "data.source can be set in the recipe only",
        ),
    ],
)
def test_mistakes_are_found_before_the_experiment(tmp_path, space, message) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        check(tmp_path, space)
    assert str(raised.value).startswith("search.yaml: ")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{_type: choice, _value: []}", ": the choice is empty; write at least one value"),
        (
            "{_type: choice, _value: [1, null]}",
            r"._value\[1\] must be a finite number, .* not None",
        ),
        ("{_type: choice, _value: [[1]]}", r"._value\[0\] must be a finite number, .* not \[1\]"),
        ("{_type: choice, _value: [.nan]}", r"._value\[0\] must be a finite number, .* not nan"),
        ("{_type: choice, _value: {a: 1}}", ": _value must be a list, not {'a': 1}"),
        ("{_type: choice, _value: 5}", ": _value must be a list, not 5"),
        ("{_type: choice, _value: [1e-5]}", ": YAML takes 1e-5 for text; write 1.0e-5"),
        ("{_type: choice}", " must have _type and _value, not _type"),
        ("{_type: choice, _value: [1], seed: 3}", " must have .*, not _type, _value, seed"),
        ("{_type: [1], _value: [1]}", r" has unsupported type \[1\]"),
        ("[1, 2]", " is a list, expect a dict; "),
        ("{_type: uniform, _value: []}", r": uniform must have 2 values, not \[\]"),
        ("{_type: uniform, _value: [0.1, 0.2, 0.3]}", ": uniform must have 2 values"),
        ("{_type: quniform, _value: [1, 5]}", ": quniform must have 3 values"),
        ("{_type: quniform, _value: [1, 5, 0]}", ": quniform must have a step above 0, not 0"),
        ("{_type: quniform, _value: [1, 5, -1]}", ": quniform must have a step above 0, not -1"),
        ("{_type: qnormal, _value: [1, 5, 0]}", ": qnormal must have a step above 0"),
        ("{_type: quniform, _value: [1, 5, 1.0e-320]}", ": quniform must have a step above 0"),
        ("{_type: uniform, _value: [1, 1]}", ": uniform must have high > low"),
        ("{_type: uniform, _value: [a, 1]}", ": uniform must have finite numbers, not 'a'"),
        ("{_type: uniform, _value: [true, 2]}", ": uniform must have finite numbers, not True"),
        ("{_type: uniform, _value: [0, .inf]}", ": uniform must have finite numbers, not inf"),
        ("{_type: uniform, _value: ['1e-5', 1]}", ": YAML takes 1e-5 for text; write 1.0e-5"),
        ("{_type: loguniform, _value: [0, 1]}", ": loguniform must have ends above 0, not 0"),
        ("{_type: qloguniform, _value: [-1, 1, 1]}", ": qloguniform must have ends above 0"),
        ("{_type: randint, _value: [0.5, 2]}", ": randint must have whole numbers, not 0.5"),
        ("{_type: randint, _value: [5, 5]}", ": randint must have high > low"),
        ("{_type: uniform, _value: [0, 1%s]}" % ("0" * 400), ": uniform must have finite numbers"),
        ("{_type: qlognormal, _value: [600, 1, 1.0e-100]}", ": qlognormal must have a step above"),
        ("{_type: normal, _value: [1, 0]}", ": normal must have a standard deviation above 0"),
        ("{_type: lognormal, _value: [800, 1]}", ": lognormal draws numbers too large"),
    ],
)
def test_what_is_malformed_is_one_sentence_with_its_path(tmp_path, spec, message) -> None:
    with pytest.raises(RecipeError, match=f"^search.yaml: searchSpace.floor{message}"):
        check(tmp_path, f"floor: {spec}")
    nested = f"pruner: {{_type: choice, _value: [{{_name: omp}}, {{_name: chita, rows: {spec}}}]}}"
    place = r"^search.yaml: searchSpace.pruner._value\[1\].rows"
    with pytest.raises(RecipeError, match=f"{place}{message}"):
        check(tmp_path, nested)


@pytest.mark.parametrize("name", ["TPE", "tpe", "TPE_legacy", "Anneal"])
def test_a_tuner_that_minimises_is_refused(tmp_path, name) -> None:
    """These three minimise if nothing is said."""
    tuner = {"name": name, "classArgs": {"optimize_mode": "minimize"}}
    with pytest.raises(RecipeError, match="optimize_mode is 'minimize', but the higher"):
        check(tmp_path, SPACE, tuner=tuner)
    line = "minimises by default.* write `classArgs: {optimize_mode: maximize}` under"
    for arguments in ({}, {"classArgs": {"seed": 1}}):
        with pytest.raises(RecipeError, match=line):
            check(tmp_path, SPACE, tuner={"name": name} | arguments)


def test_what_the_tuners_do_by_themselves_is_what_nni_says() -> None:
    """The table against the tuners' own signatures, of those whose packages are here."""
    checked = set()
    for meta in get_all_algo_meta():
        if meta.algo_type != "tuner":
            continue
        assert (meta.name in search._TUNERS) != (meta.name in search._UNFIT), meta.name
        module, _, name = meta.class_name.rpartition(".")
        try:
            made = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        mode = inspect.signature(made).parameters.get("optimize_mode")
        if known := search._TUNERS.get(meta.name):
            assert known.mode == (mode and mode.default), meta.name
            checked.add(meta.name)
    assert checked >= {"TPE", "Random", "GridSearch", "Evolution"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("TPE", MAXIMIZE), ("Random", {}), ("GridSearch", {}), ("Evolution", {})],
)
def test_tuners_that_take_nested_choices_pass(recipe, tmp_path, name, arguments) -> None:
    tuner = {"name": name, "classArgs": arguments}
    assert check(tmp_path, SPACE, recipe, tuner=tuner)[0] == ("multiflow", "chita")


RANGE = "sparsity: {_type: %s, _value: [0.25, 0.5]}"
WORDS = "allocation: {_type: choice, _value: [global, layer]}"


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("Metis", SPACE, "searchSpace.pruner: tuner Metis takes no alternatives with parameters"),
        ("GP", SPACE, "searchSpace.pruner: tuner GP takes no alternatives with .* one of TPE"),
        ("gptuner", SPACE, "tuner GP takes no alternatives with parameters"),
        ("SMAC", SPACE, "tuner SMAC takes no alternatives with parameters"),
        ("DNGO", SPACE, "tuner DNGO takes no alternatives with parameters"),
        (
            "Metis",
            WORDS,
            "searchSpace.allocation: tuner Metis takes no alternatives that are not nu",
        ),
        ("GP", WORDS, "tuner GP takes no alternatives that are not numbers"),
        (
            "Metis",
            RANGE % "loguniform",
            "Metis takes no loguniform, only choice, quniform, randint",
        ),
        ("GP", RANGE % "normal", "tuner GP takes no normal, only choice, loguniform, qloguniform"),
        ("SMAC", RANGE % "lognormal", "tuner SMAC takes no lognormal"),
        ("SMAC", RANGE % "uniform", r'package that is missing .* pip install "nni\[SMAC\]"'),
        ("Batch", SPACE, "tuner Batch hands over whole sets of parameters .* take one of TPE"),
        ("Hyperband", SPACE, "tuner Hyperband gives every trial a budget"),
        ("BOHB", SPACE, "tuner BOHB gives every trial a budget"),
        ("PBT", SPACE, "tuner PBT gives every trial folders of checkpoints"),
        ("PPOTuner", SPACE, "tuner PPO searches architectures"),
        ("NetworkMorphism", SPACE, "tuner NetworkMorphism searches architectures"),
        ("TPEE", SPACE, "NNI has no tuner 'TPEE' .did you mean 'TPE'"),
        ("Medianstop", SPACE, "NNI has no tuner 'Medianstop'"),
    ],
)
def test_tuners_that_cannot_search_the_space_are_refused(tmp_path, name, space, message) -> None:
    with pytest.raises(RecipeError, match=f"^search.yaml: .*{message}"):
        check(tmp_path, space, tuner={"name": name, "classArgs": MAXIMIZE})


def test_what_only_the_tuner_itself_finds_out(tmp_path) -> None:
    """It draws a few times for real: arguments that it does not know, bugs of its own."""
    tuner = {"name": "Random", "classArgs": {"speed": 3}}
    with pytest.raises(RecipeError, match="tuner Random cannot search this space .*'speed'"):
        check(tmp_path, SPACE, tuner=tuner)
    tuner = {"name": "Evolution", "classArgs": {"population_size": 0}}
    with pytest.raises(RecipeError, match="Evolution cannot search this space .*population is emp"):
        check(tmp_path, SPACE, tuner=tuner)


def test_an_assessor_that_minimises_is_refused(tmp_path) -> None:
    assessor = {"name": "Medianstop", "classArgs": {"optimize_mode": "minimize"}}
    with pytest.raises(RecipeError, match="the assessor's optimize_mode is 'minimize'"):
        check(tmp_path, SPACE, assessor=assessor)
    with pytest.raises(RecipeError, match="NNI has no assessor 'Medianstp'"):
        check(tmp_path, SPACE, assessor={"name": "Medianstp"})


def test_a_tuner_of_ones_own_passes_with_a_note(recipe, tmp_path, caplog) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('its code is not run')")
    tuner = {"className": "mine.Tuner", "codeDirectory": str(tmp_path)}
    assert check(tmp_path, SPACE, recipe, tuner=tuner)[0] == ("multiflow", "chita")
    assert "the tuner mine.Tuner is not one of NNI's own and is not looked into" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "models/none"}, "every trial fails: .*models/none.*"),
        ({"model": "{world}/train"}, "every trial fails: folder .*train has no config.json"),
        ({"model": "{world}/bare"}, "every trial fails: .*bare.*(no file|load).*"),
        ({"model": "{world}/damaged"}, "every trial fails: cannot (make|load) a model .*damaged"),
        ({"adapter": "blipp"}, "every trial fails: no adapter is called 'blipp'"),
        ({"adapter": "vit"}, "adapter 'vit' does not know BlipForPretraining"),
        ({"processor": "{world}/train"}, "every trial fails: no processor at .*train"),
        ({"device": "cuda:99"}, "every trial fails: device 'cuda:99' cannot be used"),
        ({"out": "{world}/train/metadata.jsonl/x"}, "no folder can be made in .*metadata.jsonl"),
        ({"data.source": "{world}/nowhere"}, "every trial fails: .*nowhere.* does not exist"),
        ({"data.source": "{world}/blip"}, "blip has no image column"),
        ({"data.source": "{world}/spoilt"}, "every trial fails: .*spoilt: .* cannot be used"),
        ({"data.split": "validation"}, "every trial fails: .*validation"),
        ({"data.caption_column": "words"}, "every trial fails: .*'words'"),
        (
            {"data.batches": 10},
            "trial with pruner wanda fails: .*no pairs after the 10 batches of 3",
        ),
        (
            {"data.batches": None},
            "trial with pruner wanda fails: .*what is read is not measured on",
        ),
        ({"data.batches": 11, "test": "{world}/test"}, "has 30 pairs, and 11 batches of 3 need 33"),
        ({"pairs": 25}, "has 24 pairs after the 2 batches of 3 that are read, .* give --pairs 24"),
        ({"test": "{world}/test", "pairs": 26}, "has 24 pairs, and --pairs asks for 26"),
        ({"test": "{world}/nowhere"}, "every trial fails: .*nowhere.* does not exist"),
        ({"statistics": "{world}/none.safetensors"}, "every trial fails: .*none.safetensors"),
        (
            {"statistics": "{world}/vit-statistics"},
            "statistics are of another model .adapter 'vit'",
        ),
        ({"id_profile": "{world}/none.json"}, "none.json is not a file"),
        ({"model": "{world}/vit", "processor": "{world}/blip"}, "ViTModel has no classifier"),
        (
            {"model": "{world}/vit", "processor": "{world}/blip", "metric": "recall"},
            "adapter 'vit' embeds no images and texts",
        ),
        ({"sparsity": ({"vision": 0.5, "txt": 0.5},)}, "budget for modality 'txt', which this mod"),
    ],
)
def test_what_no_trial_can_work_with_is_found(broken, recipe, tmp_path, changes, message) -> None:
    changes = {
        key: value.format(world=broken) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    of_trials = TrialSettings(
        **{key: changes.pop(key) for key in ("test", "pairs", "metric") if key in changes}
    )
    data = {key[5:]: changes.pop(key) for key in list(changes) if key.startswith("data.")}
    recipe = replace(recipe, data=replace(recipe.data, **data), **changes)
    begin = time.process_time()
    with pytest.raises(RecipeError, match=message) as raised:
        check(tmp_path, "pruner: {_type: choice, _value: [wanda]}", recipe, of_trials)
    assert str(raised.value).startswith("search.yaml: ")
    assert time.process_time() - begin < 20
    assert [path.name for path in tmp_path.iterdir()] == ["search.yaml"]


@pytest.fixture(scope="module")
def broken(world: Path) -> Path:
    """Beside what is right: a model without weights, a damaged one, and images that are none."""
    shutil.copytree(world / "blip", world / "bare")
    (world / "bare" / "model.safetensors").unlink()
    shutil.copytree(world / "blip", world / "damaged")
    (world / "damaged" / "config.json").write_text("{")
    shutil.copytree(world / "train", world / "spoilt")
    for image in (world / "spoilt").rglob("*.png"):
        image.write_bytes(b"no image")
    vit = prepare(Recipe(model=str(world / "vit"), method="omp", sparsity=(0.5,), device="cpu"))
    batches = [{"pixel_values": torch.zeros(2, 3, 16, 16)}]
    gather(vit.model, batches, method="wanda").save(world / "vit-statistics")
    return world


@pytest.mark.parametrize(
    ("changes", "metric", "message"),
    [
        ({"method": "chita", "floor": 0.01}, "loss", "method 'chita' has no floor"),
        (
            {"method": "omp", "allocation": "keep=3,of=7", "sparsity": ()},
            "auto",
            "pattern 3 of 7 does not divide the 16 inputs of 'vision.0",
        ),
        (
            {"method": "omp", "allocation": "keep=2,of=4", "sparsity": (0.6,)},
            "auto",
            "pattern 2 of 4 makes sparsity 0.5, not 0.6",
        ),
        (
            {"method": "tamt", "variant": "published", "allocation": "modality"},
            "auto",
            "one threshold for all tensors and no modality allocation",
        ),
        ({"method": "lamp-tamt", "variant": "published"}, "loss", "starts from magnitudes"),
        (
            {"method": "itersnip", "allocation": "keep=2,of=4", "sparsity": ()},
            "auto",
            "fixes the sparsity, so it cannot rise over 8 rounds",
        ),
        (
            {"method": "id*omp"},
            "auto",
            "data.batches times data.batch_size: 6 are too few, an intrinsic dimension needs 20",
        ),
        ({"autocast": "bfloat99"}, "auto", "autocast 'bfloat99' is unknown"),
    ],
)
def test_what_the_model_and_the_method_do_not_allow_is_found(
    recipe, tmp_path, changes, metric, message
) -> None:
    """The check refuses what a trial fails at."""
    recipe, of_trials = replace(recipe, **changes), TrialSettings(pairs=6, metric=metric)
    with pytest.raises(RecipeError, match=f"^search.yaml: a trial with seed 0 fails: .*{message}"):
        check(tmp_path, "seed: {_type: choice, _value: [0]}", recipe, of_trials)
    with pytest.raises(VlpError):
        run_trial(recipe, of_trials, Told({}))


def test_measuring_on_what_is_read_is_warned_of(recipe, tmp_path, caplog) -> None:
    same = TrialSettings(test=recipe.data.source, pairs=6)
    check(tmp_path, "seed: {_type: choice, _value: [0]}", recipe, same)
    assert "trials are measured on pairs that they were pruned by" in caplog.text


def test_every_value_that_may_be_drawn_is_held_against_the_data(recipe, tmp_path) -> None:
    for space, message in (
        ("data.batches: {_type: randint, _value: [1, 12]}", "data.batches 11 fails: .*no pairs"),
        (
            "data.batch_size: {_type: choice, _value: [3, 16]}",
            "data.batch_size 16 fails: .*no pair",
        ),
        (
            "data.batches: {_type: randint, _value: [1, 6]}\n"
            "data.batch_size: {_type: choice, _value: [2, 3, 6]}",
            "data.batch_size 6, data.batches 5 fails: .*no pairs after the 5 batches of 6",
        ),
        (
            "floor: {_type: uniform, _value: [0.0, 0.3]}\n"
            "sparsity: {_type: uniform, _value: [0.5, 0.8]}",
            "floor 0.3, sparsity 0.8 fails: a floor of 0.3 and sparsity 0.8 exclude each other",
        ),
        (CHITA % ("rows", "randint", "[1, 4]"), "rows 3 fails: .*rows=3 needs as many batches"),
        (
            "sparsity.vision: {_type: choice, _value: [0.5]}\n"
            "sparsity.txt: {_type: choice, _value: [0.5]}",
            "budget for modality 'txt'",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            check(tmp_path, space, recipe)


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "xvlm"])
@pytest.mark.parametrize(("method", "metric"), [("wanda", "auto"), ("chita", "loss")])
def test_what_passes_runs_and_what_is_refused_fails(
    world, tmp_path, family, method, metric
) -> None:
    """The same of every family, whose models have no values while they are checked."""
    getattr(tiny_models, f"save_{family}")(tmp_path / family)
    recipe = recipe_in(world, tmp_path / "trials")
    recipe = replace(recipe, model=str(tmp_path / family), method=method)
    of_trials = TrialSettings(pairs=6, metric=metric)
    refused = failed = None
    try:
        check(tmp_path, "seed: {_type: choice, _value: [0]}", recipe, of_trials)
    except RecipeError as error:
        refused = str(error)
    try:
        run_trial(recipe, of_trials, Told({}))
    except VlpError as error:
        failed = str(error)
    assert (refused is None) == (failed is None) == (family != "vit"), (refused, failed)
    assert refused is None or str(failed) in refused


def test_the_weights_stay_unread(recipe, world, tmp_path) -> None:
    """A checkpoint that nothing could be read from passes: the configuration tells what it is."""
    shutil.copytree(world / "blip", tmp_path / "blip")
    (tmp_path / "blip" / "model.safetensors").write_bytes(b"not read")
    recipe = replace(recipe, model="blip")
    assert check(tmp_path, SPACE, recipe)[0] == ("multiflow", "chita")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--test ./nowhere", "every trial fails: data ./nowhere does not exist"),
        ("--batches 10 --metric loss", "no pairs after the 10 batches of 3"),
        ("--pairs 25", "--pairs asks for 25"),
        ("--dtype bfloat16 --finetune-steps 2", "fine-tuning takes weights in float32"),
        ("--sparsity 0.5 0.6", "but the recipe has 2 sparsities"),
        ("--par 6 2>&1", "search.yaml: trialCommand: No such option.* .?--par"),
        ("--metric accuracy", "trialCommand: Invalid value for '--metric'"),
        ("'", "search.yaml: trialCommand .*: No closing quotation"),
    ],
)
def test_trials_are_checked_as_their_command_runs_them(world, tmp_path, words, message) -> None:
    """Options of trialCommand count; those given with --check, and its RECIPE, are above them."""
    text = (
        f"model: {world / 'blip'}\nsparsity: 0.5\nout: trials\ndevice: cpu\n"
        f"data: {{source: {world / 'train'}, batch_size: 3, batches: 2}}\n"
    )
    (tmp_path / "trial.yaml").write_text(text)
    search = {
        "searchSpace": {"pruner": {"_type": "choice", "_value": ["omp", "wanda"]}},
        "trialCommand": f"cd . && vlp nni-trial trial.yaml {words} > log.txt",
        "trialConcurrency": 1,
        "tuner": {"name": "Random"},
        "trainingService": {"platform": "local"},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    check_words = ["nni-trial", "--check", tmp_path / "search.yaml"]
    for recipe in ([], [tmp_path / "trial.yaml"]):
        found = command(*check_words, *recipe, code=2)
        assert re.search(message, found.stderr), found.stderr
    search["trialCommand"] = "vlp nni-trial trial.yaml --batches 10 --pairs 6 2>&1; echo done"
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    assert command(*check_words, "--batches", 2).stdout == "ok: 2 draws tried, pruners omp, wanda\n"


def test_paths_are_those_of_the_folder_that_trials_run_in(recipe, world, tmp_path) -> None:
    recipe = replace(recipe, model="blip", data=replace(recipe.data, source="train"))
    assert check(tmp_path, SPACE, recipe, trialCodeDirectory=str(world))[0]
    with pytest.raises(RecipeError, match="every trial fails"):
        check(tmp_path, SPACE, recipe)


def test_it_says_once_that_the_portal_is_open(recipe, tmp_path, caplog) -> None:
    experiment.warn_of_portal.cache_clear()
    for _ in range(2):
        check(tmp_path, SPACE, recipe)
    assert caplog.text.count("listens on all network interfaces and asks for no password") == 1


def test_a_space_in_a_file_of_its_own(tmp_path) -> None:
    (tmp_path / "space.json").write_text('{"pruner": {"_type": "choice", "_value": ["oomp"]}}')
    with pytest.raises(RecipeError, match="did you mean 'omp'"):
        check(tmp_path, "", searchSpaceFile="space.json")


def test_files_that_are_no_experiment(recipe, tmp_path) -> None:
    for text in ("searchspace: {}", "tunner: {name: TPE}", "a: b: c", ""):
        path = tmp_path / "search.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match="is not an experiment of NNI"):
            check_experiment(path, RECIPE, TrialSettings())
    with pytest.raises(RecipeError, match="is not an experiment of NNI: .*No such file"):
        check_experiment(tmp_path / "none.yaml", RECIPE, TrialSettings())
    assert check(tmp_path, SPACE, recipe)  # and the next one is read as if it were the first
