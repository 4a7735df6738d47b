"""The documentation says what is there: its code runs, its commands, methods and files exist."""

import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUILDERS = ("architecture.md", "decisions.md", "quirks.md")  # pages for those who change the code
GUIDES = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md"))
    if path.name not in BUILDERS
}
USERS = "\n".join([README, *GUIDES.values()])


def in_code(page):
    """What stands in code font, and the lines of blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [*"\n".join(blocks).splitlines(), *re.findall(r"`([^`\n]+)`", page)]


def commands(command, *names):
    """The words that call a command, and those of the commands below it."""
    yield names
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *names, name)


def test_every_method_is_in_the_table_and_every_row_is_a_method():
    rows = re.findall(r"^\| `([\w+-]+)` \|", GUIDES["choosing.md"], re.MULTILINE)

    assert set(rows) == {
        "multiflow", "omp", "lamp", "l2", "wanda", "random",
        "snip", "itersnip", "tamt", "lamp-tamt", "taylor", "platon", "chita", "chita++",
        "sparsegpt", "alps", "alps+", "refit", "atv", "tamp",
    }  # fmt: skip
    assert set(rows) <= set(registry().method_names())


def recalls(model, method):
    """Mean R@1 of both directions at 75 / 90%, over three seeds, as recorded."""
    path = ROOT / "benchmarks" / "results" / "id_gain.json"
    rows = json.loads(path.read_text())["figures"]["rows"]
    found = []
    for sparsity in (0.75, 0.9):
        both = [
            (row["image_to_text"] + row["text_to_image"]) / 2
            for row in rows
            if (row["model"], row["method"], row["arm"], row["sparsity"])
            == (model, method, "plain", sparsity)
        ]
        assert len(both) == 3
        found.append(f"{statistics.mean(both):.0f}")
    return " / ".join(found)


@pytest.mark.parametrize("page", [README, GUIDES["choosing.md"]], ids=["README.md", "choosing.md"])
def test_the_figures_beside_each_choice_are_the_recorded_ones(page):
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    named = [(re.search(r"`([\w+]+)`", cells[1]), cells[-2:]) for cells in rows]
    chosen = {name[1]: figures for name, figures in named if name and "/" in figures[0]}
    assert {"lamp", "alps", "multiflow", "tamt"} <= chosen.keys()
    for method in {"lamp", "alps", "multiflow", "chita", "tamt"} & chosen.keys():
        assert chosen[method] == [recalls("blip", method), recalls("xvlm", method)], method
    assert chosen["GradualPruning"] == [recalls("blip", "platon"), recalls("xvlm", "platon")]


def test_the_readme_is_short_and_names_every_family():
    assert len(README.splitlines()) <= 150
    families = {"blip": "BLIP", "xvlm": "X-VLM", "clip": "CLIP", "siglip": "SigLIP", "vit": "ViT"}
    found = registry()
    adapters = {name for name in found.adapter_names() if not found.adapter(name).general}
    assert set(families) == adapters
    table = README[README.index("## Models") :]
    assert [name for name, family in families.items() if f"{family}" not in table] == []


OF_OTHERS = {
    "--nproc-per-node",
    "--config",
    "--index-url",
    "--render",
    "--seeds",
    "--tasks",
    "--output",
}  # pip, nnictl, lmms-eval, ...


def test_every_command_and_option_that_is_mentioned_exists():
    from vlp_plugins.cli.program import main

    shown = {
        " ".join(names): CliRunner().invoke(main, [*names, "--help"]).output
        for names in commands(main)
    }
    for command in set(re.findall(r"\bvlp ((?:masks )?[a-z][a-z-]*)", "\n".join(in_code(USERS)))):
        assert command in shown, command
    text = re.sub(r"python -m benchmarks[^`\n]*", "", USERS)  # have their own options
    ours = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text)) - OF_OTHERS
    assert {option for option in ours if option not in "".join(shown.values())} == set()


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


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=str)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


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
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in BUILDERS}


def in_code_font(page):
    return re.findall(r"`([^`\n]+)`", page)


def paths_in(page):
    """The files and folders that a page names, those of our packages from their folder on."""
    path = re.compile(r"[\w./+-]+(\.(py|md|toml|cfg)|/)")
    return {text for text in in_code_font(page) if path.fullmatch(text)}


@pytest.mark.parametrize("page", [USERS, *PAGES.values()], ids=["users", *PAGES])
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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; what Zensical warns of stops it."""
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    home = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", home / "docs")
    for name in ("zensical.toml", "SECURITY.md"):
        shutil.copy(ROOT / name, home)
    for name in ("vlp_plugins", "tests"):
        (home / name).symlink_to(ROOT / name)
    runpy.run_path(str(home / "docs" / "generate.py"), run_name="__main__")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=home, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return home / "site"


def test_every_page_is_in_the_navigation_and_in_the_site(site):
    listed = re.findall(r'= "([\w/-]+)\.md"', (ROOT / "zensical.toml").read_text())
    pages = {str(path.relative_to(ROOT / "docs"))[:-3] for path in (ROOT / "docs").rglob("*.md")}

    assert len(listed) == len(set(listed))
    assert set(listed) == pages
    assert [page for page in listed if not (site / f"{page}.html").is_file()] == []


def test_what_the_pages_take_from_the_code_is_in_them(site):
    for page, text in (
        ("commands", "vlp masks verify"),
        ("recipes", "data.batch_size"),
        ("models", "Siglip2ForImageClassification"),
        ("models", "qwen2_5_vl"),
        ("api", "GradualPruning"),
    ):
        assert text in (site / f"{page}.html").read_text(encoding="utf-8"), page


def test_the_site_loads_nothing_from_a_network(site):
    loading = re.compile(
        r"""<(?:script|img|iframe|source|video|audio)[^>]*\ssrc=["']?(?:https?:)?//"""
        r"""|<link(?=[^>]*rel=["']?(?:stylesheet|preload|preconnect|icon|dns-prefetch))"""
        r"""[^>]*href=["']?(?:https?:)?//"""
        r"""|(?:url\(|@import )\s*["']?(?:https?:)?//"""
        r"""|class=["']?[^"'>]*\b(?:mermaid|pyodide)\b"""  # what the theme's script fetches for
    )
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert loading.findall(text) == [], page
        if page.suffix == ".html":
            assert "default-src 'self'; script-src 'self' 'unsafe-inline'" in text, page
