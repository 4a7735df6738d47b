"""The documentation says what is there: its code runs, its commands, methods and files exist."""

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def python_block(word):
    """The Python code of the README that has the word."""
    (found,) = [code for language, code in BLOCKS if language == "python" and word in code]
    return found


def test_the_three_lines_run(tmp_path, monkeypatch):
    from benchmarks.parity.blip import batches_from_golden, model_from_golden

    golden = ROOT / "tests" / "golden" / "blip"
    monkeypatch.chdir(tmp_path)
    names = {"model": model_from_golden(golden), "batches": batches_from_golden(golden)}

    exec(python_block("masks.save"), names)

    assert names["masks"].verify(names["model"]) == []
    assert (tmp_path / "masks.safetensors").is_file()


def test_the_example_of_a_scorer_is_a_scorer():
    import torch

    from vlp_plugins.scoring.score import Evidence

    names = {}
    exec(python_block("vlp_scorers"), names)

    scores = names["vlp_scorers"]()["square"]().score(torch.tensor([[-2.0]]), Evidence("w"))
    assert scores.tolist() == [[4.0]]


def test_the_example_of_pruning_while_training_prunes():
    import torch

    from benchmarks.parity.blip import batches_from_golden, model_from_golden

    golden = ROOT / "tests" / "golden" / "blip"
    model = model_from_golden(golden)
    batch = batches_from_golden(golden)[0]
    names = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}
    exec(python_block("GradualPruning").replace("10_000", "4"), names)

    adapter = registry().adapter_for(model)
    for _ in range(4):
        names["optimizer"].zero_grad()
        sum(adapter.losses(model, batch).values()).backward()
        names["optimizer"].step()

    masks = names["pruning"].masks()
    assert masks.removed == int(0.75 * (masks.kept + masks.removed))
    assert masks.verify(model) == []


def test_the_examples_of_structured_pruning_cut_and_save(tmp_path, monkeypatch):
    from benchmarks.parity.blip import batches_from_golden, model_from_golden
    from vlp_plugins.loading import load_model

    golden = ROOT / "tests" / "golden" / "blip"
    monkeypatch.chdir(tmp_path)
    for word in ("prune_structured", "Recorder"):
        model = model_from_golden(golden)
        names = {
            "model": model,
            "batches": batches_from_golden(golden),
            "adapter": registry().adapter_for(model),
        }
        before = sum(parameter.numel() for parameter in model.parameters())
        exec(python_block(word), names)
        assert sum(parameter.numel() for parameter in model.parameters()) < before

    rebuilt, _ = load_model("smaller")
    assert rebuilt.num_parameters() < before


def test_every_method_is_in_the_table_and_every_row_is_a_method():
    rows = re.findall(r"^\| `([\w+-]+)` \|", README, re.MULTILINE)

    assert set(rows) == {
        "multiflow", "omp", "lamp", "l2", "wanda", "random",
        "snip", "itersnip", "tamt", "lamp-tamt", "taylor", "platon", "chita", "chita++",
    }  # fmt: skip
    assert set(rows) <= set(registry().method_names())


def test_every_command_that_is_mentioned_exists():
    from vlp_plugins.cli.program import main

    mentioned = set(re.findall(r"`?vlp (?!masks|plugins`)([\w-]+)", README)) - {"plugins"}
    for command in sorted(mentioned):
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0, f"vlp {command}: {result.output}"
    for command in ("apply", "verify", "diff", "invert", "show", "import", "export"):
        assert CliRunner().invoke(main, ["masks", command, "--help"]).exit_code == 0


def test_every_option_that_is_mentioned_exists():
    from vlp_plugins.cli.program import main

    shown = "".join(
        CliRunner().invoke(main, [*command.split(), "--help"]).output
        for command in (
            "prune", "id", "sensitivity", "nni-trial", "nni-best", "evaluate", "finetune",
            "masks apply", "masks verify",
        )
    )  # fmt: skip
    readme = re.sub(r"python -m benchmarks[^`\n]*", "", README)  # have their own options
    ours = set(re.findall(r"(--[a-z][a-z-]+)", readme)) - {"--nproc-per-node", "--config"}
    assert {option for option in ours if option not in shown} == set()


PLACES = [
    "*.md",
    "Makefile",
    "docs/**/*.md",
    "changelog.d/*.md",
    "benchmarks/**/*.md",
    "benchmarks/**/*.py",
]


def test_every_benchmark_that_is_mentioned_exists():
    from benchmarks.speed.__main__ import TIMINGS

    found = set()
    for path in (path for place in PLACES for path in ROOT.glob(place)):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"python -m (benchmarks[a-z_.]*[a-z_])(?: ([a-z-]+))?", text))
    assert len(found) > 20
    for module, word in sorted(found):
        there = ROOT.joinpath(*module.split("."))
        assert (there / "__main__.py").exists() or there.with_suffix(".py").exists(), module
        assert module != "benchmarks.speed" or word in ("", *TIMINGS), word


@pytest.mark.parametrize(
    "target",
    ["demo", "test", "install", "test-all", "test-wheel", "test-oldest", "parity", "speed"],
)
def test_the_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


# The search space of an experiment and recipes of `vlp finetune` name no method.
RECIPES = sorted(
    path for path in (ROOT / "vlp_plugins" / "recipes").rglob("*.yaml")
    if path.name != "search.yaml" and not path.name.startswith("finetune-")
)  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_names_a_registered_method(path):
    recipe = yaml.safe_load(path.read_text())
    make_method(registry(), recipe["method"], **recipe.get("parameters", {}))


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_hook_is_documented():
    from vlp_plugins import hookspecs

    hooks = [value for name, value in vars(hookspecs).items() if name.startswith("vlp_")]
    assert len(hooks) >= 4
    for hook in hooks:
        assert "Returns:" in hook.__doc__


PACKAGES = (ROOT / "vlp_plugins", ROOT / "adapters" / "vlp_adapters")
SOURCES = {
    path: path.read_text(encoding="utf-8")
    for folder in ("vlp_plugins", "adapters", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PAGES = {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("architecture.md", "decisions.md", "quirks.md")
}


def in_code_font(page):
    return re.findall(r"`([^`\n]+)`", page)


def paths_in(page):
    """The files and folders that a page names, those of our packages from their folder on."""
    path = re.compile(r"[\w./+-]+(\.(py|md|toml|cfg)|/)")
    return {text for text in in_code_font(page) if path.fullmatch(text)}


@pytest.mark.parametrize("page", [README, *PAGES.values()], ids=["README.md", *PAGES])
def test_every_path_exists(page):
    named = paths_in(page)
    assert named
    assert {
        path for path in named if not any((at / path).exists() for at in (ROOT, *PACKAGES))
    } == set()


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_name_in_code_font_is_one_of_the_code(page):
    words = set(re.findall(r"\w+", "\n".join(SOURCES.values())))
    named = {
        word for text in {*in_code_font(page)} - paths_in(page) for word in re.findall(r"\w+", text)
    }

    assert {word for word in named - words if not word.isdigit()} == set()


def test_every_module_is_in_the_tree():
    home = ROOT / "vlp_plugins"
    files = {path.relative_to(home) for path in home.rglob("*.py")}
    modules = {f"{p.parent}/" if p.name == "__init__.py" and p.parts[1:] else str(p) for p in files}

    assert modules - paths_in(PAGES["architecture.md"]) == set()


def test_every_quirk_that_is_cited_is_in_the_catalogue():
    listed = re.findall(r"^- \*\*([a-z]+-[A-Z]\d+)\.\*\*", PAGES["quirks.md"], re.MULTILINE)
    assert len(listed) == len(set(listed)) > 20
    of_a_kind = rf"\b(?:{'|'.join({name.partition('-')[0] for name in listed})})-[A-Z]\d+\b"

    for path, text in SOURCES.items():
        cited = re.findall(of_a_kind, text) + re.findall(
            r"[Qq]uirk\s+((?:[a-z]+-)?[A-Z]\d+)\b", text
        )
        assert {*cited} - {*listed} == set(), path
    cited = re.findall(of_a_kind, PAGES["quirks.md"])
    assert {*cited} - {*listed} == set()
