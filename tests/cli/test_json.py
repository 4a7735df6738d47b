"""`--json`: one document on standard output, with the fields that docs/json.md lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from vlp_plugins.cli import program
from vlp_plugins.cli.masks import NOT_SPARSE
from vlp_plugins.cli.terminal import print_json
from vlp_plugins.loading import load_model
from vlp_plugins.models.saving import write_model
from vlp_plugins.models.weights import WeightMap

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
DOCUMENTED = {
    title: set(re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))
    for title, text in re.findall(
        r"^## vlp ([\w ]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
}
"""Fields by command."""


def fields(value: Any, known: set[str], path: str = "") -> Iterator[str]:
    """The fields of a document, as the page writes them; `*` where the page leaves keys open."""
    if isinstance(value, list):
        found = [name for each in value for name in fields(each, known, f"{path}[]")]
        yield from found or ([f"{path}[]"] if f"{path}[]" in known else [])
    elif isinstance(value, Mapping) and f"{path}.*" in known:
        yield f"{path}.*"
    elif isinstance(value, Mapping) and any(name.startswith(f"{path}.*") for name in known):
        for each in value.values():
            yield from fields(each, known, f"{path}.*")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from fields(each, known, f"{path}.{key}".lstrip("."))
    else:
        yield path


@pytest.fixture(scope="module")
def names(tmp_path_factory, vlp, xvlm, pruned) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("json")
    model, adapter = load_model(str(xvlm), device="cpu")
    with torch.no_grad():
        next(iter(WeightMap.of(model, adapter).values())).parameter.fill_(1.0)
    write_model(model, folder / "revived", source=str(xvlm))
    masks = pruned / "masks-0.75.safetensors"
    words = ("--model", xvlm, "--method", "omp", "--sparsity", "0.5", "--out", folder / "omp")
    vlp("prune", *words)
    return {
        "no_data": folder / "omp" / "masks-0.5.safetensors",
        "xvlm": xvlm,
        "photos": tiny_models.save_photos(folder / "photos", 24),
        "masks": masks,
        "other": pruned / "masks-0.9.safetensors",
        "sparse": pruned / "model-0.75",
        "revived": folder / "revived",
        "out": folder / "out",
        "compared": folder / "compared",
    }


RUN = "plan --model {xvlm} --data {photos} --batch-size 8 --batches 3 --sparsity 0.5"
LINES = {
    "inspect": ["inspect {xvlm}"],
    "plan": [RUN, f"{RUN} --method itersnip", f"{RUN} --method id*omp"],
    "methods": ["methods"],
    "plugins": ["plugins"],
    "compare": [
        "compare {xvlm} --data {photos} --batch-size 4 --methods omp lamp id*omp "
        "--sparsity 0.5 --out {compared}",
    ],
    "evaluate": [
        "evaluate {xvlm} --task retrieval --data {photos}",
        "evaluate {xvlm} --task retrieval --data {photos} --masks {masks} --out {out}",
    ],
    "masks show": ["masks show {masks}", "masks show {no_data}"],
    "masks verify": ["masks verify {masks} {sparse}", "masks verify {masks} {revived}"],
    "masks diff": ["masks diff {masks} {other}"],
}


@pytest.mark.parametrize("name", LINES)
def test_the_page_lists_every_field_and_no_other(name, names, vlp) -> None:
    known, found = DOCUMENTED[name], set()
    for line in LINES[name]:
        code = NOT_SPARSE if "{revived}" in line else 0
        result = vlp(*line.format(**names).split(), "--json", code=code)
        document = json.loads(result.stdout)
        assert document["schema"] == 1
        found |= set(fields(document, known))
    assert found == known


def test_every_command_with_the_option_is_on_the_page(vlp) -> None:
    assert set(LINES) == set(DOCUMENTED)
    for name in LINES:
        assert "--json" in vlp(*name.split(), "--help").stdout


def test_the_fields_say_what_the_text_says(names, vlp) -> None:
    shown = json.loads(vlp("masks", "show", names["masks"], "--json").stdout)
    assert shown["counts"]["all"]["sparsity"] == 0.75
    assert shown["sparsity"] == 0.75
    found = json.loads(vlp("inspect", names["xvlm"], "--json").stdout)
    assert sum(group["elements"] for group in found["groups"]) == found["prunable"]
    assert found["prunable"] == shown["counts"]["all"]["total"]
    assert found["structure"] == shown["structure"]
    line = ["masks", "verify", names["masks"], names["revived"], "--json"]
    verified = json.loads(vlp(*line, code=1).stdout)
    assert verified["ok"] is False
    assert verified["violations"]
    assert all(0 < each["not_zero"] == each["removed"] for each in verified["violations"])
    one = json.loads(vlp("methods", "chita", "--json").stdout)
    every = json.loads(vlp("methods", "--json").stdout)["methods"]
    assert {**next(m for m in every if m["name"] == "chita"), "schema": 1} == one
    assert json.loads(vlp("methods", "id*chita", "--json").stdout) == one
    known = vlp("methods", "nosuch", code=2).stderr
    assert known.count("wanda") == 1, "a score and a method of one name"


def test_errors_leave_standard_output_empty(names, vlp) -> None:
    result = vlp("masks", "show", names["photos"], "--json", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_what_json_cannot_say_is_null_or_text(capsys) -> None:
    print_json({"x": float("nan"), "y": [float("inf"), 1.5], "p": Path("a"), "n": "\x7f\x1b\x9b"})
    text = capsys.readouterr().out
    assert json.loads(text) == {
        "schema": 1, "x": None, "y": [None, 1.5], "p": "a", "n": "\x7f\x1b\x9b"
    }  # fmt: skip
    assert all(line.isprintable() for line in text.splitlines())


def test_the_page_lists_the_exit_codes() -> None:
    codes = set(map(int, re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)))
    ours = {
        program.MENDABLE, program.UNEXPECTED, program.INTERRUPTED, program.TERMINATED, NOT_SPARSE,
    }  # fmt: skip
    assert codes == ours | {0}
