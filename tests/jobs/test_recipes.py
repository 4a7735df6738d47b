"""Recipes: every key, what is refused, and the command line that says the same."""

from __future__ import annotations

import logging
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlp_plugins.jobs.finetune import load_finetune_recipe
from vlp_plugins.jobs.recipe_values import amount_of, penalty_of
from vlp_plugins.jobs.recipes import (
    OPTIONS,
    DataRecipe,
    Recipe,
    command_of,
    load_recipe,
    need,
    parameter_of,
    sparsity_of,
    with_options,
)
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import RecipeError, SparsityError

PAPER = Path(__file__).parents[2] / "vlp_plugins" / "recipes" / "paper"
PRUNING = sorted(path for path in PAPER.glob("*.yaml") if not path.name.startswith("finetune-"))

WHOLE = """
model: models/blip
adapter: blip
processor: models/tokens
method: multiflow
parameters:
  edges: true
  nodes: false
sparsity: [0.63, {vision: 0.5, text: 0.8}]
allocation: modality
floor: 1e-2
owners: first
variant: published
walk: blocks
tokens: atv
data:
  source: photos/
  split: train
  batch_size: 8
  batches: 20
  seed: 3
  image_column: scan
  caption_column: words
  max_length: 30
statistics: old.safetensors
id_profile: id-profile.json
out: pruned
seed: 7
save_model: true
checkpoint_every: 10
lambda: 1e-2
memory_budget: 8GiB
autocast: float16
skip_nonfinite: true
keep_statistics: true
dtype: bfloat16
device: cpu
"""

EXPECTED = Recipe(
    model="models/blip",
    adapter="blip",
    processor="models/tokens",
    method="multiflow",
    parameters={"edges": True, "nodes": False, "lambda": 0.01},
    sparsity=(0.63, {"vision": 0.5, "text": 0.8}),
    allocation="modality",
    floor=0.01,
    owners="first",
    variant="published",
    walk="blocks",
    tokens="atv",
    data=DataRecipe("photos/", "train", 8, 20, 3, "scan", "words", 30),
    statistics="old.safetensors",
    id_profile="id-profile.json",
    out="pruned",
    seed=7,
    save_model=True,
    checkpoint_every=10,
    memory_budget="8GiB",
    autocast="float16",
    skip_nonfinite=True,
    keep_statistics=True,
    dtype="bfloat16",
    device="cpu",
)


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Loads a recipe from its text."""

    def load(text: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path)

    return load


def test_every_key(read: Any) -> None:
    assert read(WHOLE) == EXPECTED
    standard = Recipe()
    same = [
        f.name for f in fields(Recipe) if getattr(EXPECTED, f.name) == getattr(standard, f.name)
    ]
    assert same == ["method"]  # the test sets every other key to something unusual


def test_most_keys_may_be_left_out(read: Any) -> None:
    found = read("model: m\nsparsity: 0.75\ndata: photos/\nout: o\ndevice:\n")
    assert found == Recipe(model="m", sparsity=(0.75,), data=DataRecipe(source="photos/"), out="o")
    assert found.data.batch_size == 32
    assert read("sparsity: {vision: 0.5}").sparsity == ({"vision": 0.5},)


def test_a_whole_number_may_be_written_with_a_point(read: Any) -> None:
    found = read("seed: 3.0\ncheckpoint_every: 1e2\ndata: {batches: 7.0, batch_size: 4.0}")
    assert (found.seed, found.checkpoint_every) == (3, 100)
    assert (found.data.batches, found.data.batch_size) == (7, 4)
    assert {type(each) for each in (found.seed, found.data.batches)} == {int}


def test_a_pattern_is_an_allocation(read: Any) -> None:
    assert read("pattern: {keep: 2, of: 4}") == Recipe(allocation="keep=2,of=4")
    with pytest.raises(RecipeError, match="pattern and allocation exclude each other"):
        read("pattern: {keep: 2, of: 4}\nallocation: global")
    with pytest.raises(RecipeError, match="line 1: a pattern keeps 1 to 2 of 2, not 4"):
        read("pattern: {keep: 4, of: 2}")
    with pytest.raises(RecipeError, match="pattern must be a mapping with keep and of"):
        read("pattern: {keep: 2}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparcity: 0.5", "line 1: unknown key 'sparcity' .did you mean 'sparsity'"),
        ("method: omp\nbatch_size: 4", "line 2: unknown key 'batch_size' .it belongs under data:"),
        ("data:\n  out: x", "line 2: unknown key 'out' .it does not belong under data:"),
        ("data:\n  batchsize: 4", "line 2: unknown key 'batchsize' .did you mean 'batch_size'"),
        ("ties: first", "it is called 'owners'"),
        ("sparsity: many", "line 1: sparsity must be a number, not the text 'many'"),
        ("sparsity: [0.5, [0.6]]", "sparsity must be a number, not a list of 1"),
        ("sparsity: []", "line 1: sparsity must be a number such as 0.75, .* not a list of 0"),
        ("sparsity: {}", "line 1: sparsity must be a number, or budgets .* a mapping with nothing"),
        ("sparsity: [0.5, {}]", "sparsity must be a number, or budgets .* a mapping with nothing"),
        ("sparsity: 75", "line 1: sparsity .* not 75; did you mean 0.75"),
        ("sparsity: {vision: 1.0}", r"line 1: sparsity is .* in \[0, 1\), not 1"),
        ("seed: 1.5", "seed must be a whole number from 0 on, not 1.5"),
        ("seed: true", "seed must be a whole number from 0 on, not true"),
        ("floor: .inf", "floor must be a number, not inf"),
        ("data:\n  batch_size: 0", "line 2: batch_size must be a whole number from 1 on, not 0"),
        ("data: [a, b]", "data must be a mapping of keys to values, not a list of 2"),
        ("lambda: small", "line 1: lambda must be a number or auto, not the text 'small'"),
        ("lambda: [1, 2]", "lambda must be a number or auto, not a list of 2"),
        ("lambda: true", "lambda must be a number or auto, not true"),
        ("lambda: 1\nparameters: {lambda: 2}", "lambda stands here and among the parameters"),
        ("memory_budget: much", "line 1: memory_budget: 'much' is not an amount of memory"),
        ("autocast: float32", "autocast must be one of bfloat16, float16, not the text 'float32'"),
        ("save_model: 'yes'", "save_model must be true or false, not the text 'yes'"),
        ("variant: publishd", "variant must be one of default, published"),
        ("allocation: modalty", "line 1: unknown allocation 'modalty' .did you mean 'modality'"),
        ("model: {a: 1}", "model must be text, not a mapping with a"),
        ("parameters: edges", "parameters must be a mapping of keys to values, not the text"),
        ("seed: 1\nseed: 2", "line 2: seed stands here a second time"),
        ("model: [a", "line 1: not YAML"),
        ("a: b: c", "line 1: not YAML"),
        ("", "is not a recipe: it holds empty"),
        ("just words", "is not a recipe: it holds the text 'just words'"),
        ("model: &a\n  x: *a", "nested deeper than 5 levels"),
    ],
)
def test_what_is_refused_and_where(read: Any, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        read(text)
    assert "recipe.yaml" in str(raised.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*: No such file$"):
        load_recipe(tmp_path / "none.yaml")


def test_recipes_of_the_package_by_name(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = load_recipe("paper/multiflow-blip")
    assert named == load_recipe(PAPER / "multiflow-blip.yaml")
    assert load_recipe("recipes/paper/multiflow-blip.yaml") == named  # from a former clone
    assert load_finetune_recipe("paper/finetune-blip-vqa").task == "vqa"
    with pytest.raises(
        RecipeError, match="nor a recipe of the package .did you mean 'paper/omp-xvlm'"
    ):
        load_recipe("paper/omp-xvml")
    with pytest.raises(RecipeError, match="known: .*nni/trial, .*paper/tamt-xvlm"):
        load_recipe("zzz")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "multiflow-blip").write_text("seed: 7")
    assert load_recipe("paper/multiflow-blip").seed == 7  # a file of one's own wins


def test_numbers_that_yaml_takes_for_text(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = "parameters: {damping: 1e-5, word: '1e-5'}\nfloor: 2E3"
    assert yaml.safe_load(text)["parameters"]["damping"] == "1e-5"  # the reason for all this
    with caplog.at_level(logging.WARNING):
        found = read(text)
    assert found.parameters == {"damping": 1e-5, "word": "1e-5"}
    assert found.floor == 2000.0
    assert "line 1: 1e-5 is taken for a number; YAML writes it 1.0e-5" in caplog.text
    assert "line 2: 2E3 is taken for a number; YAML writes it 2.0e+3" in caplog.text


def test_lambda_is_a_parameter_with_a_key_of_its_own(read: Any) -> None:
    assert read("lambda: auto").parameters == {"lambda": "auto"}
    assert read("lambda: 1e-5").parameters == {"lambda": 1e-5}
    assert read("lambda: '1e-5'").parameters == {"lambda": 1e-5}
    found = read("lambda: 1000\nparameters: {rounds: 60}")
    assert found.parameters == {"rounds": 60, "lambda": 1000.0}
    assert command_of(found).endswith("--parameter rounds=60 --lambda 1000.0")

    assert with_options(found, **{"lambda": 0.1}).parameters == {"rounds": 60, "lambda": 0.1}
    both = with_options(found, parameter={"rounds": 2}, **{"lambda": "auto"})
    assert both.parameters == {"rounds": 2, "lambda": "auto"}
    assert found.parameters["lambda"] == 1000.0


def test_values_of_the_command_line_are_judged_like_those_of_a_recipe() -> None:
    assert penalty_of("1e-5", "--lambda") == 1e-5
    assert penalty_of("auto", "--lambda") == "auto"
    assert amount_of("8GiB", "--memory-budget") == "8GiB"
    with pytest.raises(RecipeError, match="command line.*: --lambda must be a number or auto"):
        penalty_of("tiny", "--lambda")
    with pytest.raises(RecipeError, match="command line: --memory-budget: '8 elephants' is no"):
        amount_of("8 elephants", "--memory-budget")


def from_command(words: list[str]) -> Recipe:
    """Reads the options back, as a command line would."""
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word
            options.setdefault(name, [])
        else:
            options[name].append(word)
    known = {option: key.split(".")[-1] for key, option in OPTIONS.items()}
    whole = {"batch_size", "batches", "seed", "max_length", "checkpoint_every"}
    values: dict[str, Any] = {}
    for option, given in options.items():
        key = known[option]
        name = option.strip("-").replace("-", "_")
        if key == "parameters":
            values[name] = dict(map(parameter_of, given))
        elif key == "sparsity":
            values[name] = tuple(map(sparsity_of, given))
        elif key in ("save_model", "skip_nonfinite", "keep_statistics"):
            values[name] = True
        elif key == "lambda":
            values[name] = penalty_of(given[0], option)
        else:
            values[name] = int(given[0]) if key in whole else given[0]
            values[name] = float(given[0]) if key == "floor" else values[name]
    return with_options(Recipe(), **values)


@pytest.mark.parametrize(
    "recipe",
    [
        EXPECTED,
        Recipe(model="a b", method="omp", sparsity=(0.63, 0.9), out="o"),
        Recipe(parameters={"name": "x y", "word": "true", "number": "1e-5", "sizes": [1, 2]}),
        Recipe(parameters={"damping": 1e-5, "none": None}, floor=0.1 + 0.2),
        Recipe(method="chita", parameters={"lambda": "auto"}, memory_budget="500 MB"),
        Recipe(method="id*multiflow", allocation="id", id_profile="my profile.json"),
        Recipe(method="chita", parameters={"lambda": 1e-5, "rows": 50}),
    ],
)
def test_the_command_says_the_same_as_the_recipe(recipe: Recipe) -> None:
    words = shlex.split(command_of(recipe))
    assert words[:2] == ["vlp", "prune"]
    assert from_command(words[2:]) == recipe


def test_no_shell_takes_a_guided_method_for_a_pattern_of_file_names() -> None:
    assert command_of(Recipe(method="id*omp")) == "vlp prune --method 'id*omp'"


def test_the_command_is_short_where_everything_is_usual() -> None:
    recipe = Recipe(model="m", sparsity=(0.63, 0.9), data=DataRecipe("my photos"), out="o")
    assert command_of(recipe) == (
        "vlp prune --model m --method multiflow --sparsity 0.63 0.9 --data 'my photos' --out o"
    )


def test_the_command_line_wins_over_the_recipe() -> None:
    found = with_options(EXPECTED, batch_size=64, out="elsewhere", data=None, save_model=False)
    assert (found.data.batch_size, found.out, found.save_model) == (64, "elsewhere", False)
    assert found.data.source == "photos/"
    with pytest.raises(RecipeError, match="unknown option 'batchsize' .did you mean 'batch_size'"):
        with_options(EXPECTED, batchsize=64)


def test_what_a_run_needs_is_named() -> None:
    need(EXPECTED, "model", "data.source", "sparsity", "out")
    with pytest.raises(RecipeError, match="no model given; pass --model, or write `model: ...`"):
        need(Recipe(), "model")
    with pytest.raises(RecipeError, match="pass --data, or write `data: {source: ...}`"):
        need(Recipe(), "data.source")


def test_sparsities_of_the_command_line() -> None:
    assert sparsity_of("0.75") == 0.75
    assert sparsity_of("vision=0.5,text=0.8") == {"vision": 0.5, "text": 0.8}
    for wrong in ("much", "vision=", "vision=0.5,0.8", "1.5"):
        with pytest.raises(SparsityError):
            sparsity_of(wrong)
    with pytest.raises(RecipeError, match="write name=value"):
        parameter_of("edges")


@pytest.mark.parametrize("path", PRUNING, ids=lambda path: path.stem)
def test_the_papers_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.sparsity == (0.63, 0.75, 0.9)
    assert recipe.variant == "published"
    method, family = path.stem.split("-")[:2]
    assert recipe.method == method
    assert recipe.adapter == {"dino": "vit"}.get(family, family)
    made = make_method(registry(), recipe.method, **recipe.parameters)
    assert made.reads_data == (recipe.data.batches is not None)
    if made.reads_data and recipe.adapter != "vit":
        assert recipe.data.batches == (500 if method == "chita" else 3000)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("itersnip-blip", {"rounds": 60, "batches_per_round": 50, "schedule": "exp"}),
        ("chita++-blip", {"rounds": 60, "rows": 50, "schedule": "exp", "lambda": 0.1}),
        ("chita++-xvlm", {"rounds": 60, "rows": 50, "schedule": "exp", "lambda": 0.1}),
        ("chita-blip", {"lambda": 0.1}),
        ("chita-xvlm", {"lambda": 1000.0}),
    ],
)
def test_the_papers_rounds_and_ridge_penalties(stem: str, expected: dict[str, Any]) -> None:
    assert load_recipe(PAPER / f"{stem}.yaml").parameters == expected


def test_there_is_a_recipe_for_every_method_of_the_paper_that_exists() -> None:
    found = {path.stem.split("-")[0] for path in PRUNING}
    assert found == {
        *("random", "omp", "lamp", "l2", "multiflow"),
        *("snip", "itersnip", "tamt", "chita", "chita++"),
    }


@pytest.mark.parametrize(
    ("stem", "rows", "epochs", "rate"),
    [
        ("blip-retrieval", 128, 6, 1e-5),
        ("blip-captioning", 256, 5, 1e-5),
        ("blip-vqa", 256, 10, 2e-5),
        ("xvlm-retrieval", 128, 10, 3e-5),
        ("xvlm-captioning", 256, 5, 1e-5),
        ("xvlm-vqa", 256, 10, 5e-5),
    ],
)
def test_the_papers_table_11(stem: str, rows: int, epochs: int, rate: float) -> None:
    recipe = load_finetune_recipe(PAPER / f"finetune-{stem}.yaml")
    settings = recipe.settings
    assert (recipe.adapter, recipe.task) == tuple(stem.split("-"))
    assert (recipe.batch_size, settings.epochs, settings.learning_rate) == (rows, epochs, rate)
    by_family = {
        "blip": ((0.9, 0.999), 0.05, "cosine", 0.0),
        "xvlm": ((0.9, 0.98), 0.01, "linear", 0.1),
    }
    found = (settings.betas, settings.weight_decay, settings.schedule, settings.warmup)
    assert found == by_family[str(recipe.adapter)]


def test_the_papers_fine_tuning_of_dino() -> None:
    recipe = load_finetune_recipe(PAPER / "finetune-dino.yaml")
    settings = recipe.settings
    assert (recipe.adapter, recipe.task, recipe.batch_size) == ("vit", "classification", 32)
    assert (settings.epochs, settings.learning_rate, settings.warmup) == (10, 1e-5, 0.1)
    assert (settings.schedule, settings.betas) == ("cosine", (0.9, 0.999))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1.0", "unknown key 'learning_rat' of fine-tuning .*'learning_rate'"),
        ("task: caption", "line 1: task must be one of retrieval, captioning, vqa"),
        ("epochs: 0", "line 1: epochs must be a whole number from 1 on"),
        ("betas: 0.9", r"betas must be a list of two numbers"),
        ("betas: [0.9, 1.5]", "betas must be from 0 to below 1"),
        ("warmup: 1", "warm-up must be a fraction"),
        ("method: multiflow", "unknown key 'method' of fine-tuning"),
    ],
)
def test_wrong_recipes_of_fine_tuning_say_what_and_where(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_finetune_recipe(tmp_path / "wrong.yaml")
