"""What setup.cfg lists is what there is: a package it forgets works here and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from vlp_plugins.runtime.version import __version__

ROOT = Path(__file__).parents[1]
HOMES = {"vlp_plugins": ROOT / "vlp_plugins", "vlp_adapters": ROOT / "adapters" / "vlp_adapters"}


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_every_package_is_found() -> None:
    there = {
        ".".join((name, *path.parent.relative_to(home).parts))
        for name, home in HOMES.items()
        for path in home.rglob("__init__.py")
    }
    code = (
        "from setuptools import Distribution; made = Distribution(); made.parse_config_files(); "
        "made.set_defaults(); print(*made.packages)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=-1, text=True, check=True)
    assert there - set(done.stdout.split()) == set()
    assert len(there) > 20


def test_every_folder_with_code_is_a_package() -> None:
    for home in HOMES.values():
        for path in home.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


@pytest.fixture
def patterns(setup: ConfigParser) -> list[str]:
    """Of the files that are installed with the code."""
    return [p.strip() for each in setup["options.package_data"].values() for p in each.split(",")]


def test_types_and_the_template_are_installed(patterns: list[str]) -> None:
    data = [HOMES["vlp_plugins"] / "report" / "page.html.j2"]
    data += [home / "py.typed" for home in HOMES.values()]
    for path in data:
        assert path.is_file()
        assert any(path.match(pattern) for pattern in patterns), path


def test_other_files_beside_the_code_are_installed_too(patterns: list[str]) -> None:
    for home in HOMES.values():
        for path in home.rglob("*"):
            is_code = path.suffix in (".py", ".pyc") or path.is_dir() or ".mypy" in str(path)
            assert is_code or any(path.match(pattern) for pattern in patterns), path


def test_the_command_is_the_entry_point(setup: ConfigParser) -> None:
    assert "vlp = vlp_plugins.cli:main" in lines(setup["options.entry_points"]["console_scripts"])


def test_importing_the_package_imports_neither_torch_nor_a_host() -> None:
    code = (
        "import sys, vlp_plugins; "
        "print([m for m in ('torch', 'transformers', 'nni', 'torch_pruning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=-1, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("vlp_plugins.scorers.base", "Scorer"),
        ("vlp_plugins.allocation", "Allocation"),
        ("vlp_plugins.statistics.second_moment", "InputSecondMoment"),
        ("vlp_plugins.methods.base", "Composition"),
        ("vlp_plugins.calibration.statistic", "InputSecondMoment"),
        ("vlp_plugins.solvers.problem", "Problem"),
        ("vlp_plugins.training", "GradualPruning"),
        ("vlp_plugins.lora", "merge"),
        ("vlp_plugins.adapter", "Adapter"),
    ],
)
def test_former_module_names_forward_with_a_warning(former, name):
    """A process of its own: what is imported once warns no more."""
    code = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        f"    module = importlib.import_module({former!r})\n"
        f"print(getattr(module, {name!r}).__module__)\n"
        "print([str(each.message) for each in said if each.category is FutureWarning][-1])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    where, said = run.stdout.splitlines()
    assert where.startswith("vlp_plugins.")
    assert where != former
    assert f"{former} is now " in said


def test_nothing_needs_what_only_posix_has_to_be_imported() -> None:
    """Windows is not tested; that its users get as far as a sentence is."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("runtime", "masks", "data", "methods", "jobs", "cli")
        for path in (ROOT / "vlp_plugins" / room).rglob("*.py")
    )
    code = (
        "import os, sys, importlib, torch, transformers\n"
        "sys.modules.update(resource=None, fcntl=None)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "del os.sysconf\n"
        "from pathlib import Path\n"
        "from vlp_plugins.runtime import memory\n"
        "memory._MEMINFO = memory._STATM = memory._STATUS = memory._CGROUP = Path('none')\n"
        "print(memory.free_ram(), memory.peak_resident_bytes(), memory.resident_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=-1, text=True, check=True)
    assert done.stdout == f"{2**31} 0 0\n"


def test_the_citation_is_valid_and_of_this_version() -> None:
    """As the Citation File Format 1.2.0 wants it."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(found)
    assert __version__.partition(".dev")[0] == found["version"]
    for reference in found["references"]:
        assert {"type", "title", "authors"} <= set(reference)
