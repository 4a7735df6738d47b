"""What is built in, what an outsider can add, what is shown, and what an import costs."""

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from outsiders import ADAPTER, SCORER, report_of

from vlp_plugins import hookspecs
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.description import describe_method
from vlp_plugins.methods.reconstruction.method import Reconstruction
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models import discovery as plugins
from vlp_plugins.models.registry import KINDS, plugins_table
from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError
from vlp_plugins.scoring.score import Evidence


def test_every_kind_of_offer_has_its_hook():
    specs = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction)]
    assert {f"vlp_{kind}" for kind in KINDS} == {n for n in specs if n.startswith("vlp_")}


# What is built in


def test_our_own_methods_and_adapters_come_through_the_same_hooks(site):
    registry = site.discover()

    assert {report.distribution for report in registry.plugins()} == {"vlp-plugins"}
    assert [report.status for report in registry.plugins()] == ["ok"] * len(registry.plugins())
    assert {"omp", "multiflow"} <= set(registry.method_names())
    assert {"magnitude", "lamp", "random"} <= set(registry.names("scorers"))
    assert {"blip", "xvlm", "vit"} <= set(registry.adapter_names())


def test_no_two_built_ins_clash():
    ours = [r for r in plugins.registry().plugins() if r.distribution == "vlp-plugins"]
    assert ours
    assert all(report.status == "ok" and report.notes == () for report in ours)


def test_a_former_module_that_was_divided_still_has_all_its_names(monkeypatch):
    monkeypatch.delitem(sys.modules, "vlp_plugins.methods.base", raising=False)
    with pytest.warns(FutureWarning, match="is now vlp_plugins.extend"):
        former = import_module("vlp_plugins.methods.base")
    assert former.Composition is Composition
    assert former.Procedure.__name__ == "Procedure"


def test_the_registry_is_made_once():
    assert plugins.registry() is plugins.registry()


def test_a_scorer_is_a_method_with_global_allocation():
    method = make_method(plugins.registry(), "magnitude")
    assert isinstance(method, Composition)
    assert method.name == "magnitude"
    assert type(method.allocation).__name__ == "GlobalAllocation"


def test_a_registered_method_goes_before_the_scorer_of_its_name():
    method = make_method(plugins.registry(), "wanda")
    assert type(method.allocation).__name__ == "RowAllocation"


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="no method is called 'multiflo'.*'multiflow'"):
        make_method(plugins.registry(), "multiflo")


def test_a_wrong_parameter_is_answered_with_the_allowed_ones():
    with pytest.raises(UnknownNameError, match="no parameter 'edge'; it takes edges, nodes"):
        make_method(plugins.registry(), "multiflow", edge=False)
    with pytest.raises(UnknownNameError, match="no parameter 'power'; it takes no parameters"):
        make_method(plugins.registry(), "magnitude", power=2)


# What an outsider can add


def test_an_outsider_adds_a_scorer_that_is_a_method_at_once(site):
    site.install("acme-scores", SCORER % "smallest", version="2.1")
    registry = site.discover()

    method = make_method(registry, "smallest", power=2.0)
    assert method.parameters == {"power": 2.0}
    scores = method.score.score(torch.tensor([[1.0, -3.0]]), Evidence("w"))
    assert scores.tolist() == [[-1.0, -9.0]]
    report = report_of(registry, "acme-scores")
    assert (report.distribution, report.version) == ("acme-scores", "2.1")
    assert report.registered == {"scorers": ("smallest",)}


SOLVER = """
from dataclasses import dataclass
from vlp_plugins.extend import RowAllocation, Solver

@dataclass(frozen=True)
class Plain(Solver):
    \"\"\"The largest scores stay (Doe, 2026), as they are.

    Attributes:
        power: of nothing.
    \"\"\"

    name = "plain"
    allocation = RowAllocation()
    power: float = 1.0

    def solve(self, layer, scores, selections):
        return [(each.mask(scores), layer.weight) for each in selections]

@hookimpl
def vlp_solvers():
    return {"plain": Plain, "alps": Plain}
"""


def test_an_outsider_adds_a_solver_that_is_a_method_at_once(site):
    site.install("acme-solvers", SOLVER)
    registry = site.discover()

    method = make_method(registry, "plain", power=2.0)
    assert isinstance(method, Reconstruction)
    assert method.name == "plain"
    assert method.parameters == {"power": 2.0}
    assert type(method.allocation).__name__ == "RowAllocation"
    described = describe_method(registry, "plain")
    assert described.summary == "The largest scores stay, as they are"
    assert described.paper == "Doe, 2026"
    assert [(each.name, each.help) for each in described.parameters] == [("power", "of nothing.")]
    assert described.needs == ("data",)
    report = report_of(registry, "acme-solvers")
    assert report.registered == {"solvers": ("acme-solvers:alps", "plain")}
    assert "solver 'alps' clashes with the built-in solver" in report.notes[0]
    assert make_method(registry, "alps").solver.name == "alps"
    assert make_method(registry, "acme-solvers:alps").name == "acme-solvers:alps"
    with pytest.raises(UnknownNameError, match="no parameter 'powr'; it takes power"):
        make_method(registry, "plain", powr=2.0)


def test_a_plugin_may_be_an_object_with_methods(site):
    site.install(
        "acme",
        """
        class Plugin:
            @hookimpl
            def vlp_methods(self):
                return {"mine": lambda: Composition("mine", Smallest())}
        plugin = Plugin()
        """,
    )
    info = site.folder / "acme-1.0.dist-info" / "entry_points.txt"
    info.write_text("[vlp_plugins]\nacme = acme_plugin:plugin\n")
    assert make_method(site.discover(), "mine").name == "mine"


def test_a_host_is_imported_only_when_it_is_used(site):
    site.install("acme", "@hookimpl\ndef vlp_hosts(): return {'h': lambda: __import__('no_host')}")
    registry = site.discover()
    assert "h" in registry.names("hosts")
    with pytest.raises(UnsupportedError, match="host 'h' cannot be used: No module named"):
        registry.host("h")


def test_a_factory_that_makes_something_else_is_named(site):
    site.install("acme", "@hookimpl\ndef vlp_scorers(): return {'odd': dict}")
    with pytest.raises(UnsupportedError, match="scorer 'odd' of acme is a dict, not a .*Scorer"):
        make_method(site.discover(), "odd")


def test_parameters_that_a_factory_refuses_or_misses_are_explained(site):
    site.install(
        "acme",
        """
        def needy(power): return Smallest(power)
        def passing_on(**parameters): return Smallest(**parameters)
        @hookimpl
        def vlp_scorers(): return {"needy": needy, "passing_on": passing_on}
        """,
    )
    registry = site.discover()
    with pytest.raises(UnsupportedError, match="'needy' needs a value for power"):
        make_method(registry, "needy")
    with pytest.raises(UnsupportedError, match=r"cannot be made with \{'colour': 1\}.*colour"):
        make_method(registry, "passing_on", colour=1)


# What is shown and what is imported


def test_the_table_tells_what_became_of_every_plugin(site):
    site.install("acme", (SCORER % "lamp") + ADAPTER % ("everything", "Everything"))
    site.install("bad", "import no_such_module")
    site.install("late", "")
    rows = {row["plug-in"]: row for row in plugins_table(site.discover("late").plugins())}

    assert rows["acme"] == {
        "plug-in": "acme",
        "distribution": "acme",
        "version": "1.0",
        "status": "ok",
        "registered": "scorers: acme:lamp; adapters: everything",
        "notes": "scorer 'lamp' clashes with the built-in scorer: use 'acme:lamp'",
    }
    assert rows["bad"]["status"] == "failed"
    assert "no_such_module" in rows["bad"]["notes"]
    assert (rows["late"]["status"], rows["late"]["registered"]) == ("blocked", "")


def test_importing_the_package_imports_no_host_and_finds_no_plugins(site):
    site.install("acme", SCORER % "smallest")
    program = """
        import sys
        HOSTS = {"nni", "torch_pruning", "transformers"}
        import vlp_plugins
        from vlp_plugins import Pattern, hookimpl
        import vlp_plugins.models.discovery
        assert not HOSTS & set(sys.modules), HOSTS & set(sys.modules)
        assert "acme_plugin" not in sys.modules
        assert "vlp_plugins.methods.builtin" not in sys.modules
        registry = vlp_plugins.models.discovery.registry()
        assert "smallest" in registry.method_names()
        assert not HOSTS & set(sys.modules), HOSTS & set(sys.modules)
        print("imported", sorted(n for n in sys.modules if n.endswith("_plugin")))
    """
    root = str(Path(plugins.__file__).parents[2])
    path = os.pathsep.join([str(site.folder), root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)],
        env={**os.environ, "PYTHONPATH": path, "VLP_PLUGINS_BLOCK": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "acme_plugin" in done.stdout
