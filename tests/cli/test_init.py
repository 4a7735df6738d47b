"""`vlp init` writes a recipe that explains itself and parses as it stands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlp_plugins.jobs.recipes import KEYS, DataRecipe, Recipe, load_recipe
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry

COMMENTED = re.compile(r"^( *)#(\w+:)", re.MULTILINE)


def test_what_is_given_is_in_it_and_the_rest_is_default(vlp, tmp_path) -> None:
    target = tmp_path / "my.yaml"
    words = ["--model", "hub/model", "--data", "photos/{000..003}.tar", "--method", "id*chita"]
    said = vlp("init", *words, "--out", target).stdout
    assert said == f"written: {target}; to run it: vlp prune {target}\n"
    assert load_recipe(target) == Recipe(
        model="hub/model",
        method="id*chita",
        sparsity=(0.75,),
        data=DataRecipe("photos/{000..003}.tar"),
        out="pruned",
    )


@pytest.mark.parametrize("method", registry().method_names())
def test_every_comment_before_a_key_is_its_default(vlp, tmp_path, method) -> None:
    target = tmp_path / "recipe.yaml"
    vlp("init", "--method", method, "--out", target)
    text = target.read_text()
    standard = Recipe(method=method, sparsity=(0.75,), out="pruned")
    assert load_recipe(target) == standard

    target.write_text(COMMENTED.sub(r"\1\2", text))

    found = load_recipe(target)
    assert replace(found, parameters={}) == standard
    made, usual = (make_method(registry(), method, **each) for each in (found.parameters, {}))
    assert in_any_walk(made) == in_any_walk(usual) | found.parameters


def in_any_walk(method: Method) -> dict[str, Any]:
    """The parameters of a method, also of what does it block by block."""
    return {**method.parameters, **method.for_walk("blocks").parameters}


def test_every_key_is_there_and_explained(vlp, tmp_path) -> None:
    target = tmp_path / "recipe.yaml"
    vlp("init", "--method", "chita", "--out", target)
    text = target.read_text()
    assert max(map(len, text.splitlines())) <= 100
    keys = set(re.findall(r"^#?(\w+):", text, re.MULTILINE))
    assert keys == KEYS - {"pattern"}  # another way to write an allocation
    parts = text.split("\n\n")
    lone = [part for part in parts if re.match(r" *#?\w+:", part) and part != "data:"]
    assert lone == []


def test_a_file_that_is_there_stays(vlp, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("method: omp\n")
    assert "recipe.yaml exists already" in vlp("init", code=2).stderr
    assert Path("recipe.yaml").read_text() == "method: omp\n"
    vlp("init", "--overwrite")
    assert load_recipe("recipe.yaml").method == "multiflow"
    assert "did you mean 'chita'" in vlp("init", "--method", "chitta", code=2).stderr


def test_the_recipe_runs(vlp, xvlm, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    vlp("init", "--model", xvlm, "--data", photos)
    vlp("prune", "recipe.yaml", "--batch-size", "6")
    assert Path("pruned/masks-0.75.safetensors").is_file()
