"""Every `--help` is understood by itself: sentences, examples that run, 80 columns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tiny_models
from vlp_command import command

from vlp_plugins.cli import main
from vlp_plugins.cli.help import HEADINGS, Option
from vlp_plugins.jobs.finetune import FinetuneRecipe
from vlp_plugins.jobs.recipes import OPTIONS, DataRecipe, Recipe
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings


def commands(group: click.Group = main, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by the words after `vlp`."""
    yield name, group
    for word, inner in group.commands.items():
        if isinstance(inner, click.Group):
            yield from commands(inner, f"{name} {word}".strip())
        else:
            yield f"{name} {word}".strip(), inner


ALL = dict(commands())
OWN = [(name, o) for name, each in ALL.items() for o in each.params if isinstance(o, Option)]


@pytest.mark.parametrize("name", ALL)
def test_help_fits_a_terminal_and_says_what_it_is(name) -> None:
    text = command(*name.split(), "--help", columns=80).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\nExamples:\n  vlp ") == 1
    assert "\n  -q, --quiet" in text
    assert "\n  -v, --verbose" in text
    short = ALL[name].short_help if name else "x"
    assert short, name
    assert len(short) <= 55


@pytest.mark.parametrize("name", [name for name, each in ALL.items() if hasattr(each, "commands")])
def test_no_line_of_a_list_of_commands_is_cut(name) -> None:
    text = command(*name.split(), "--help", columns=80).stdout
    rows = text.split("\nCommands:\n")[1].splitlines()
    assert len(rows) == len(ALL[name].commands)  # none is wrapped
    assert not any(row.endswith("...") for row in rows)


@pytest.mark.parametrize(("name", "option"), OWN, ids=lambda each: getattr(each, "name", each))
def test_an_option_is_explained_in_sentences_under_a_heading(name, option) -> None:
    assert option.help, option.name
    assert re.fullmatch(r"[A-Z'].{8,}[.?]", option.help), option.help
    assert "left out" not in option.help  # the default says it
    assert option.heading in HEADINGS or option.name in ("quiet", "verbose")
    assert not re.search(r"INTEGER|TEXT|FLOAT|RANGE", option.make_metavar(click.Context(main)))


def test_words_of_the_field_are_explained_where_they_are_used() -> None:
    text = " ".join(command("prune", "--help").stdout.split())
    for words in (
        "the calibration data, from which the method learns which weights matter",
        "Modalities, the vision, text and fusion part of a model",
        "The owners of a weight are the layers that share it",
        "Fraction of its weights that every layer keeps at least",
        "'published' computes as the code of the authors does",
    ):
        assert words in text


STANDARDS = {
    "prune": [(option[2:], key, Recipe()) for key, option in OPTIONS.items() if "." not in key]
    + [
        (option[2:], key[5:], DataRecipe())
        for key, option in OPTIONS.items()
        if key.startswith("data.")
    ],
    "finetune": [
        (option.opts[0][2:], option.name, each)
        for option in ALL["finetune"].params
        for each in (FinetuneRecipe(), FinetuneSettings())
        if isinstance(option, Option) and hasattr(each, str(option.name))
    ],
}


@pytest.mark.parametrize("name", STANDARDS)
def test_defaults_in_words_are_those_of_a_recipe(name) -> None:
    """The options themselves have none, so that a recipe's value counts."""
    options = {o.opts[0][2:]: o for o in ALL[name].params}
    given = ALL[name].make_context(name, [], resilient_parsing=True).params
    compared = 0
    for option, key, recipe in STANDARDS[name]:
        value = getattr(recipe, key)
        assert given[option.replace("-", "_")] in (None, ()), option
        if isinstance(value, int | float | tuple) and not isinstance(value, bool) and value != ():
            numbers = value if isinstance(value, tuple) else (value,)
            assert tuple(map(float, options[option].standard.split())) == numbers, option
            compared += 1
        elif isinstance(value, str):
            assert options[option].standard == value, option
            compared += 1
    assert compared > 5


# --- examples ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, xvlm: Path, pruned: Path) -> Path:
    """The files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "model").symlink_to(xvlm)
    (folder / "masks.safetensors").symlink_to(pruned / "masks-0.75.safetensors")
    (folder / "other.safetensors").symlink_to(pruned / "masks-0.9.safetensors")
    for split in ("train", "test"):
        tiny_models.save_photos(folder / "photos" / split, 40)
    (folder / "recipe.yaml").write_text("model: model\nmethod: omp\n")
    (folder / "finetune.yaml").write_text("task: retrieval\nbatch_size: 4\n")
    (folder / "trial.yaml").write_text(
        "model: model\nsparsity: 0.75\nout: trials\n"
        "data: {source: photos, batch_size: 4, batches: 2}\n"
    )
    (folder / "search.yaml").write_text(
        "searchSpace: {pruner: {_type: choice, _value: [omp, multiflow]}}\n"
        "trialCommand: vlp nni-trial trial.yaml\ntrialCodeDirectory: .\nmaxTrialNumber: 2\n"
        "trialConcurrency: 1\ntuner: {name: Random}\ntrainingService: {platform: local}\n"
    )
    return folder


BEFORE = {
    "masks verify": "masks apply masks.safetensors model --out pruned-model",
    "masks import": "masks export masks.safetensors model --out published.pth",
    "nni-best": "nni-trial trial.yaml --pairs 4",
    "": "prune --model model --method omp --sparsity 0.75 --out pruned",
}
"""What must be run first, for what an example reads."""


@pytest.mark.parametrize("name", ALL)
def test_examples_run(name, world, tmp_path, monkeypatch) -> None:
    if name.startswith("nni"):
        pytest.importorskip("nni")
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    if name in BEFORE:
        command(*BEFORE[name].split())
    for example in ALL[name].examples:
        if not name and "vlp prune" in example:
            continue  # the same is run as an example of the command itself
        words = shlex.split(example.replace("\\\n", ""))
        assert words[0] == "vlp"
        assert words[1 : 1 + len(name.split())] == name.split()
        shown = command(*words[1:], columns=80).stdout.splitlines()
        wide = [line for line in shown if len(line) > 80 and not line.startswith("written: /")]
        assert wide == [], example
