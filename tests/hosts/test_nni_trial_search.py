"""A search space is checked against the registry before the experiment starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from nni_trial_examples import command

from vlp_plugins.errors import RecipeError
from vlp_plugins.hosts.nni.overlay import TrialSettings
from vlp_plugins.hosts.nni.search import check_experiment, draws
from vlp_plugins.recipes import DataRecipe, Recipe, load_recipe

EXAMPLES = Path(__file__).parents[2] / "recipes" / "nni"
RECIPE = Recipe(model="m", sparsity=(0.75,), data=DataRecipe("photos", batches=2), out="o")
SPACE = """
pruner:
  _type: choice
  _value:
    - _name: multiflow
    - {_name: chita, lambda: {_type: loguniform, _value: [1.0e-5, 1.0]}}
"""


CHITA = "pruner: {_type: choice, _value: [{_name: chita, %s: {_type: %s, _value: %s}}]}"


def check(folder: Path, space: str, **extra: Any) -> tuple[tuple[str, ...], int]:
    config = {
        "searchSpace": yaml.safe_load(space),
        "trialCommand": "vlp nni-trial trial.yaml",
        "trialConcurrency": 1,
        "tuner": {"name": "Random"},
        "trainingService": {"platform": "local"},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(config | extra))
    found = check_experiment(path, RECIPE, TrialSettings())
    return found.methods, found.draws


def test_the_examples_are_right() -> None:
    result = command("nni-trial", EXAMPLES / "trial.yaml", "--check", EXAMPLES / "search.yaml")
    assert result.stdout.startswith("ok: 8 draws tried, pruners id*multiflow, multiflow, wanda")
    recipe = load_recipe(EXAMPLES / "trial.yaml")
    assert (recipe.sparsity, recipe.out) == ((0.75,), "trials")
    command_line = yaml.safe_load((EXAMPLES / "search.yaml").read_text())["trialCommand"]
    assert command_line.split()[:3] == ["vlp", "nni-trial", "trial.yaml"]


def test_every_alternative_and_both_ends_are_tried(tmp_path) -> None:
    space = SPACE + (
        "sparsity: {_type: uniform, _value: [0.5, 0.9]}\nid: {_type: choice, _value: [true, false]}"
    )
    assert check(tmp_path, space) == (("id*multiflow", "multiflow", "id*chita"), 5)
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
        ("{_type: normal, _value: [0.5, 1]}", [0.5]),
        ("{_type: lognormal, _value: [0, 1]}", [1.0]),
        ("{_type: choice, _value: [a, b]}", ["a", "b"]),
    ],
)
def test_what_is_tried_of_a_distribution(spec, expected) -> None:
    assert [each["x"] for each in draws(yaml.safe_load(f"x: {spec}"))] == expected


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
    ],
)
def test_mistakes_are_found_before_the_experiment(tmp_path, space, message) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        check(tmp_path, space)
    assert str(raised.value).startswith("search.yaml: ")


def test_a_tuner_that_minimises_is_refused(tmp_path) -> None:
    tuner = {"name": "TPE", "classArgs": {"optimize_mode": "minimize"}}
    with pytest.raises(RecipeError, match="optimize_mode is 'minimize', but the higher"):
        check(tmp_path, SPACE, tuner=tuner)


def test_a_space_in_a_file_of_its_own(tmp_path) -> None:
    (tmp_path / "space.json").write_text('{"pruner": {"_type": "choice", "_value": ["oomp"]}}')
    with pytest.raises(RecipeError, match="did you mean 'omp'"):
        check(tmp_path, "", searchSpaceFile="space.json")


def test_files_that_are_no_experiment(tmp_path) -> None:
    for text in ("searchspace: {}", "a: b: c", ""):
        path = tmp_path / "search.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match="is no experiment of NNI"):
            check_experiment(path, RECIPE, TrialSettings())
    with pytest.raises(RecipeError, match="is no experiment of NNI: .*No such file"):
        check_experiment(tmp_path / "none.yaml", RECIPE, TrialSettings())
