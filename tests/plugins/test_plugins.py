"""How plug-ins are found, what they may offer, and what happens to those that are broken.

Outsiders are written into a folder as an installer leaves them: a module and its metadata.
"""

import importlib
import inspect
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from vlp_plugins import hookspecs, plugins
from vlp_plugins.errors import UnclaimedModelError, UnknownNameError, UnsupportedError
from vlp_plugins.methods.base import Composition
from vlp_plugins.offers import KINDS
from vlp_plugins.plugins import discover, plugins_table
from vlp_plugins.scorers.base import Evidence

PREAMBLE = """
from vlp_plugins import hookimpl
from vlp_plugins.adapter import Adapter
from vlp_plugins.scorers.magnitude import Magnitude
from vlp_plugins.methods.base import Composition

class Smallest(Magnitude):
    name = "smallest"
    def __init__(self, power=1.0):
        self.power = power
    def score(self, weight, evidence):
        return -weight.abs().float() ** self.power

class Everything(Adapter):
    name = "everything"
    def claims(self, model): return True
    def weights(self, model): return ()
    def streams(self, model, batch, *, published=False): return iter(())

class Raising(Everything):
    def claims(self, model): raise RuntimeError("claims is broken")
"""
SCORER = "@hookimpl\ndef vlp_scorers(): return {%r: Smallest}\n"
ADAPTER = "@hookimpl\ndef vlp_adapters(): return {%r: %s}\n"


class Site:
    """A folder of installed outsiders."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = []

    def install(self, distribution, source, *, entry=None, version="1.0"):
        module = f"{distribution.replace('-', '_')}_plugin"
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(PREAMBLE + dedent(source))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(
            f"[vlp_plugins]\n{entry or distribution} = {module}\n"
        )
        importlib.invalidate_caches()

    def discover(self, block=""):
        return discover(metadata.distributions(path=[str(self.folder)]), block)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    site = Site(tmp_path)
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)


def report_of(registry, name):
    return next(report for report in registry.plugins() if report.name == name)


def test_every_kind_of_offer_has_its_hook():
    specs = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction)]
    assert {f"vlp_{kind}" for kind in KINDS} == {n for n in specs if n.startswith("vlp_")}


# What is built in


def test_our_own_methods_and_adapters_come_through_the_same_hooks(site):
    registry = site.discover()

    assert {report.distribution for report in registry.plugins()} == {"vlp-plugins"}
    assert [report.status for report in registry.plugins()] == ["ok"] * len(registry.plugins())
    assert {"omp", "multiflow"} <= set(registry.method_names())
    assert {"magnitude", "lamp", "random"} <= set(registry.scorer_names())
    assert {"blip", "xvlm", "vit"} <= set(registry.adapter_names())


def test_no_two_built_ins_clash():
    ours = [r for r in plugins.registry().plugins() if r.distribution == "vlp-plugins"]
    assert ours
    assert all(report.status == "ok" and report.notes == () for report in ours)


def test_the_registry_is_made_once():
    assert plugins.registry() is plugins.registry()


def test_a_scorer_is_a_method_with_global_allocation():
    method = plugins.registry().method("magnitude")
    assert isinstance(method, Composition)
    assert method.name == "magnitude"
    assert type(method.allocation).__name__ == "GlobalAllocation"


def test_a_registered_method_goes_before_the_scorer_of_its_name():
    method = plugins.registry().method("wanda")
    assert type(method.allocation).__name__ == "RowAllocation"


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="no method is called 'multiflo'.*'multiflow'"):
        plugins.registry().method("multiflo")


def test_a_wrong_parameter_is_answered_with_the_allowed_ones():
    with pytest.raises(UnknownNameError, match="no parameter 'edge'; it takes edges, nodes"):
        plugins.registry().method("multiflow", edge=False)
    with pytest.raises(UnknownNameError, match="no parameter 'power'; it takes no parameters"):
        plugins.registry().scorer("magnitude", power=2)


# What an outsider can add


def test_an_outsider_adds_a_scorer_that_is_a_method_at_once(site):
    site.install("acme-scores", SCORER % "smallest", version="2.1")
    registry = site.discover()

    method = registry.method("smallest", power=2.0)
    assert method.parameters == {"power": 2.0}
    scores = method.score.score(torch.tensor([[1.0, -3.0]]), Evidence("w"))
    assert scores.tolist() == [[-1.0, -9.0]]
    report = report_of(registry, "acme-scores")
    assert (report.distribution, report.version) == ("acme-scores", "2.1")
    assert report.registered == {"scorers": ("smallest",)}


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
    assert site.discover().method("mine").name == "mine"


def test_a_host_is_imported_only_when_it_is_used(site):
    site.install("acme", "@hookimpl\ndef vlp_hosts(): return {'h': lambda: __import__('no_host')}")
    registry = site.discover()
    assert registry.host_names() == ["h"]
    with pytest.raises(UnsupportedError, match="host 'h' cannot be used: No module named"):
        registry.host("h")


def test_a_factory_that_makes_something_else_is_named(site):
    site.install("acme", "@hookimpl\ndef vlp_scorers(): return {'odd': dict}")
    with pytest.raises(UnsupportedError, match="scorer 'odd' of acme is a dict, not a .*Scorer"):
        site.discover().scorer("odd")


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
        registry.scorer("needy")
    with pytest.raises(UnsupportedError, match=r"cannot be made with \{'colour': 1\}.*colour"):
        registry.scorer("passing_on", colour=1)


# Which adapter describes a model


def test_a_model_that_nobody_claims_needs_a_module_adapter():
    with pytest.raises(UnclaimedModelError, match=r"no adapter claims Linear.*ModuleAdapter\("):
        plugins.registry().adapter_for(nn.Linear(2, 2))


def test_outsiders_are_asked_before_built_ins(site):
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    vit = ViTModel(ViTConfig(**size, intermediate_size=4, image_size=4, patch_size=2))
    assert site.discover().adapter_for(vit).name == "vit"
    site.install("acme", ADAPTER % ("everything", "Everything"))
    assert site.discover().adapter_for(vit).name == "everything"


def test_an_adapter_whose_claims_raises_is_logged_and_skipped(site, caplog):
    site.install("acme", ADAPTER % ("everything", "Everything"))
    site.install("bad", ADAPTER % ("raising", "Raising"))
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        assert site.discover().adapter_for(nn.Linear(2, 2)).name == "everything"
    assert "adapter 'raising' of bad was skipped" in caplog.text


def test_the_error_names_an_adapter_that_could_not_be_asked(site):
    site.install("bad", ADAPTER % ("raising", "Raising"))
    with pytest.raises(UnclaimedModelError, match="'raising' failed: RuntimeError: claims is"):
        site.discover().adapter_for(nn.Linear(2, 2))


def test_two_outsiders_that_claim_one_model_leave_the_choice_to_the_user(site):
    site.install("acme", ADAPTER % ("one", "Everything"))
    site.install("umbrella", ADAPTER % ("two", "Everything"))
    with pytest.raises(UnsupportedError, match="'one' and 'two' all claim Linear.*adapter='one'"):
        site.discover().adapter_for(nn.Linear(2, 2))


# Names that clash


def test_a_built_in_keeps_its_bare_name(site, caplog):
    site.install("acme", SCORER % "lamp")
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        registry = site.discover()

    assert type(registry.scorer("lamp")).__name__ == "Lamp"
    assert type(registry.scorer("acme:lamp")).__name__ == "Smallest"
    report = report_of(registry, "acme")
    assert report.registered == {"scorers": ("acme:lamp",)}
    assert "'lamp' clashes with the built-in scorer: use 'acme:lamp'" in report.notes[0]
    assert report.notes[0] in caplog.text


def test_a_scorer_clashes_with_a_method_because_it_is_one(site):
    site.install("acme", SCORER % "omp")
    registry = site.discover()
    assert type(registry.method("omp").score).__name__ == "Magnitude"
    assert type(registry.method("acme:omp").score).__name__ == "Smallest"
    with pytest.raises(UnknownNameError, match="must be named in full: 'acme:omp'"):
        registry.scorer("omp")


@pytest.mark.parametrize("order", [("acme", "umbrella"), ("umbrella", "acme")])
def test_two_outsiders_with_one_name_are_both_named_in_full(site, order):
    for distribution in order:
        site.install(distribution, SCORER % "same")
    registry = site.discover()

    assert {"acme:same", "umbrella:same"} <= set(registry.method_names())
    for distribution in order:
        method = registry.method(f"{distribution}:same")
        assert type(method.score).__module__ == f"{distribution}_plugin"
    with pytest.raises(UnknownNameError, match="'acme:same' or 'umbrella:same'"):
        registry.method("same")


def test_the_full_name_is_understood_without_a_clash_too(site):
    site.install("Acme_Scores", SCORER % "smallest")
    assert site.discover().method("acme-scores:smallest").name == "acme-scores:smallest"


def test_two_plugins_of_one_distribution_with_one_name_stay_apart(site):
    site.install("acme", SCORER % "same")
    site.install("other", SCORER % "same")
    (site.folder / "acme-1.0.dist-info" / "entry_points.txt").write_text(
        "[vlp_plugins]\none = acme_plugin\ntwo = other_plugin\n"
    )
    (site.folder / "other-1.0.dist-info" / "entry_points.txt").unlink()
    names = site.discover().scorer_names()
    assert {"acme:one:same", "acme:two:same"} <= set(names)


def test_the_second_plugin_of_one_name_is_called_after_its_distribution(site):
    site.install("umbrella", SCORER % "b", entry="extra")
    site.install("acme", SCORER % "a", entry="extra")
    registry = site.discover()
    assert report_of(registry, "extra").distribution == "acme"
    assert report_of(registry, "umbrella:extra").registered == {"scorers": ("b",)}


# Broken plug-ins: (what is wrong, what the report says)

BROKEN = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "arguments": ("@hookimpl\ndef vlp_adapters(config): return {}", "config"),
    "misspelt": ("@hookimpl\ndef vlp_scorer(): return {}", "unknown hook 'vlp_scorer'"),
    "wrapper": ("@hookimpl(wrapper=True)\ndef vlp_adapters(): return (yield)", "is a wrapper"),
    "unmarked": ("def vlp_adapters(): return {}", "vlp_adapters is not marked with"),
    "raises": ("@hookimpl\ndef vlp_adapters(): return {}['x']", "vlp_adapters raised KeyError"),
    "none": ("@hookimpl\ndef vlp_adapters(): pass", "returned NoneType, not a mapping"),
    "list": ("@hookimpl\ndef vlp_adapters(): return ['x']", "returned list, not a mapping"),
    "key": ("@hookimpl\ndef vlp_adapters(): return {1: Everything}", "returned the name 1"),
    "colon": ("@hookimpl\ndef vlp_adapters(): return {'a:b': Everything}", "name 'a:b'"),
    "value": ("@hookimpl\ndef vlp_adapters(): return {'x': 'Everything'}", "is not callable"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_plugin_is_reported_and_never_half_registered(site, caplog, broken):
    source, reason = BROKEN[broken]
    site.install("bad", (SCORER % "valid_part") + source)
    site.install("good", SCORER % "smallest")
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        registry = site.discover()

    report = report_of(registry, "bad")
    assert report.status == "failed"
    assert reason in report.error
    assert "\n" not in report.error
    assert report.registered == {}
    assert report.error in caplog.text
    assert "valid_part" not in registry.method_names()
    assert "smallest" in registry.method_names()


def test_a_plugin_without_hooks_is_told_what_to_write(site):
    site.install("empty", "")
    assert "implements no hook; write one of vlp_scorers" in (
        report_of(site.discover(), "empty").error
    )


def test_an_unknown_name_points_to_the_plugins_that_were_skipped(site):
    site.install("bad", "import no_such_module")
    with pytest.raises(UnknownNameError, match=r"skipped plug-ins: bad \(see `vlp plugins`\)"):
        site.discover().method("something_of_bad")


def test_a_broken_installation_of_somebody_else_does_no_harm(site):
    (site.folder / "leftover-1.0.dist-info").mkdir()
    site.install("acme", SCORER % "smallest")
    assert "smallest" in site.discover().scorer_names()


def test_a_plugin_cannot_ask_for_the_registry_while_it_is_made(site, monkeypatch):
    site.install(
        "impatient",
        "import vlp_plugins.plugins\n@hookimpl\ndef vlp_scorers(): vlp_plugins.plugins.registry()",
    )
    monkeypatch.setattr(plugins, "_registry", None)
    found = list(metadata.distributions(path=[str(site.folder)]))
    monkeypatch.setattr(plugins.metadata, "distributions", lambda: found)
    error = report_of(plugins.registry(), "impatient").error
    assert "while plug-ins are being found" in error


# Blocked plug-ins


@pytest.mark.parametrize("block", ["all", "plug", "Acme_Scores", "other, plug"])
def test_a_blocked_plugin_is_listed_and_not_imported(site, block):
    site.install("acme-scores", SCORER % "smallest", entry="plug")
    registry = site.discover(block)

    assert report_of(registry, "plug").status == "blocked"
    assert "acme_scores_plugin" not in sys.modules
    assert "smallest" not in registry.method_names()
    assert "multiflow" in registry.method_names()


def test_blocking_one_leaves_the_others(site):
    site.install("acme", SCORER % "a")
    site.install("umbrella", SCORER % "b")
    names = site.discover("acme").scorer_names()
    assert "a" not in names
    assert "b" in names


def test_a_name_that_blocks_nothing_is_reported(site, caplog):
    site.install("acme", SCORER % "a")
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        site.discover("acm")
        site.discover("builtin")  # our own cannot be blocked
    assert "no outside plug-in or distribution is called 'acm' (did you mean 'acme'?)" in (
        caplog.text
    )
    assert "'builtin'" in caplog.text


def test_the_environment_variable_blocks(site, monkeypatch):
    site.install("acme", SCORER % "a")
    monkeypatch.setenv("VLP_PLUGINS_BLOCK", "acme")
    assert report_of(site.discover(block=None), "acme").blocked


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
        import vlp_plugins.plugins
        assert not HOSTS & set(sys.modules), HOSTS & set(sys.modules)
        assert "acme_plugin" not in sys.modules
        assert "vlp_plugins.builtin" not in sys.modules
        registry = vlp_plugins.plugins.registry()
        assert "smallest" in registry.method_names()
        assert not HOSTS & set(sys.modules), HOSTS & set(sys.modules)
        print("imported", sorted(n for n in sys.modules if n.endswith("_plugin")))
    """
    root = str(Path(plugins.__file__).parents[1])
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
