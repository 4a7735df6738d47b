"""Real plug-ins: wheels are built, installed beside us and used from a fresh process.

The sources in `wheels/` are also examples: `wheels/good` is a complete plug-in.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import vlp_plugins

SOURCES = Path(__file__).parent / "wheels"
ALL = ["good", "broken_import", "broken_signature", "misspelt_hook", "clashing"]


def run(*command, environment=None):
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with all wheels installed; building leaves nothing in the sources."""
    folder = tmp_path_factory.mktemp("wheels")
    shutil.copytree(SOURCES, folder / "sources")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    sources = [str(folder / "sources" / name) for name in ALL]
    alone = ("--no-deps", "--no-index")
    run(*pip, "wheel", *alone, "--no-build-isolation", "-w", str(folder / "dist"), *sources)
    wheels = [str(wheel) for wheel in sorted((folder / "dist").glob("*.whl"))]
    assert len(wheels) == len(ALL)
    run(*pip, "install", *alone, "--no-compile", "--target", str(folder / "site"), *wheels)
    return folder / "site"


def in_fresh_process(site, program, block=""):
    """Runs a program that sees the wheels, and returns what it prints as JSON, and its log."""
    package = Path(vlp_plugins.__file__).parents[1]
    path = [str(site), str(package), str(package / "adapters"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "VLP_PLUGINS_BLOCK": block,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


LIST = """
    import json, sys
    from vlp_plugins.models.discovery import registry
    from vlp_plugins.models.registry import plugins_table
    known = registry()
    print(json.dumps({
        "rows": plugins_table(known.plugins()),
        "methods": known.method_names(),
        "adapters": known.adapter_names(),
        "modules": sorted(sys.modules),
    }))
"""


@pytest.fixture(scope="module")
def listing(site):
    return in_fresh_process(site, LIST)


def rows(listed):
    return {row["plug-in"]: row for row in listed["rows"]}


def test_the_good_plugin_is_listed_with_what_it_registered(listing):
    row = rows(listing[0])["acme"]
    assert (row["distribution"], row["version"], row["status"]) == ("acme-pruning", "1.2.3", "ok")
    assert row["registered"] == "scorers: closeness_to_mean; adapters: acme-pruning:two_towers"


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        ("broken_import", "No module named 'a_module_that_nobody_installed'"),
        ("broken_signature", "hookimpl definition: vlp_adapters(config)"),
        ("misspelt_hook", "unknown hook 'vlp_adaptors' (did you mean 'vlp_adapters'?)"),
    ],
)
def test_a_broken_plugin_is_listed_with_the_reason_and_registers_nothing(listing, plugin, reason):
    listed, log = listing
    row = rows(listed)[plugin]
    assert (row["version"], row["status"], row["registered"]) == ("0.1", "failed", "")
    assert reason in row["notes"]
    assert f"plug-in {plugin} of" in log
    assert f"score_of_{plugin}" not in listed["methods"]
    assert f"adapter_of_{plugin}" not in listed["adapters"]


def test_a_clashing_plugin_gives_way_to_the_built_in_and_shares_with_an_outsider(listing):
    listed, _ = listing
    assert {"magnitude", "clashing-names:magnitude"} <= set(listed["methods"])
    assert {"acme-pruning:two_towers", "clashing-names:two_towers"} <= set(listed["adapters"])
    assert "two_towers" not in listed["adapters"]
    assert "clashes with the built-in scorer" in rows(listed)["clashing"]["notes"]


def test_our_own_plugins_are_untouched(listing):
    ours = [row for row in listing[0]["rows"] if row["distribution"] == "vlp-plugins"]
    assert {"builtin", "adapters"} <= {row["plug-in"] for row in ours}
    assert {row["status"] for row in ours} == {"ok"}


def test_blocking_all_outsiders_imports_none_of_them(site):
    listed, log = in_fresh_process(site, LIST, block="all")
    outsiders = [row for row in listed["rows"] if row["distribution"] != "vlp-plugins"]
    assert {row["status"] for row in outsiders} == {"blocked"}
    assert len(outsiders) >= len(ALL)
    ours = {"acme_pruning", "broken_import", "broken_signature", "misspelt_hook", "clashing_names"}
    assert not ours & set(listed["modules"])
    assert "plug-in" not in log


def test_blocking_one_removes_the_clash_that_it_caused(site):
    listed, _ = in_fresh_process(site, LIST, block="clashing-names")
    assert rows(listed)["clashing"]["status"] == "blocked"
    assert "two_towers" in listed["adapters"]


def test_the_good_plugins_scorer_and_adapter_prune_a_model(site):
    program = """
        import json
        import torch
        from acme_pruning.two_towers import TwoTowers
        from vlp_plugins import prune
        from vlp_plugins.models.discovery import registry
        torch.manual_seed(0)
        model = TwoTowers()
        masks = prune(model, method="closeness_to_mean", sparsity=0.5, power=2.0)
        masks.apply(model)
        weights = [model.image_tower.weight, model.text_tower.weight]
        print(json.dumps({
            "adapter": registry().adapter_for(model).name,
            "names": sorted(masks),
            "zeros": sum(int((w == 0).sum()) for w in weights),
            "elements": sum(w.numel() for w in weights),
        }))
    """
    assert in_fresh_process(site, program)[0] == {
        "adapter": "two_towers",
        "names": ["text.0.projection", "vision.0.projection"],
        "zeros": 32,
        "elements": 64,
    }
