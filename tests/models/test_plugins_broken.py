"""Plug-ins that are broken or blocked: reported, never fatal, never half registered."""

import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
from outsiders import SCORER, report_of

from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models import discovery as plugins
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.registry import time_limit
from vlp_plugins.runtime.errors import UnknownNameError

# Broken plug-ins: (what is wrong, what the report says)

BROKEN = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "no exception": ("class Own(BaseException): pass\nraise Own('odd')", "Own: odd"),
    "hook": ("@hookimpl\ndef vlp_adapters(): raise GeneratorExit", "GeneratorExit"),
    "loop": ("while True: pass", "plug-in 'bad' of bad, while it is imported, has not ended after"),
    "greedy loop": (
        "while True:\n    try:\n        import time; time.sleep(60)\n    except Exception: pass",
        "VLP_PLUGINS_TIMEOUT=SECONDS gives it more time",
    ),
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
def test_a_broken_plugin_is_reported_and_never_half_registered(site, caplog, monkeypatch, broken):
    monkeypatch.setenv("VLP_PLUGINS_TIMEOUT", "0.3")
    handler = signal.getsignal(signal.SIGALRM)
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
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_ctrl_c_ends_more_than_the_plugin(site):
    site.install("bad", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        site.discover()


def test_a_timer_that_the_code_sets_meanwhile_is_left_alone():
    """As Ctrl-C on the command line does, to be raised again if it is swallowed."""
    kept = signal.getsignal(signal.SIGALRM)

    def again(_number, _frame):
        raise AssertionError

    try:
        with time_limit("this"):
            signal.signal(signal.SIGALRM, again)
            signal.setitimer(signal.ITIMER_REAL, 60)
        assert signal.getsignal(signal.SIGALRM) is again
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        with time_limit("that"):
            assert signal.getsignal(signal.SIGALRM) is again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def test_who_takes_long_is_named_before_the_limit_in_any_thread(site, caplog, monkeypatch):
    monkeypatch.setattr("vlp_plugins.models.registry.NAMED_AFTER", 0.05)
    site.install("slow", "import time\ntime.sleep(0.5)\n" + SCORER % "smallest")
    with caplog.at_level(logging.WARNING, "vlp_plugins"), ThreadPoolExecutor(1) as pool:
        registry = pool.submit(site.discover).result()
    assert "smallest" in registry.names("scorers")
    assert "plug-in 'slow' of slow, while it is imported, has not ended after 0.05 s" in caplog.text


def test_a_plugin_without_hooks_is_told_what_to_write(site):
    site.install("empty", "")
    assert "implements no hook; write one of vlp_scorers" in (
        report_of(site.discover(), "empty").error
    )


def test_an_unknown_name_points_to_the_plugins_that_were_skipped(site):
    site.install("bad", "import no_such_module")
    with pytest.raises(UnknownNameError, match=r"skipped plug-ins: bad \(see `vlp plugins`\)"):
        make_method(site.discover(), "something_of_bad")


def test_a_broken_installation_of_somebody_else_does_no_harm(site):
    (site.folder / "leftover-1.0.dist-info").mkdir()
    site.install("acme", SCORER % "smallest")
    assert "smallest" in site.discover().names("scorers")


def test_a_plugin_cannot_ask_for_the_registry_while_it_is_made(site, monkeypatch):
    site.install(
        "impatient",
        "from vlp_plugins.models.discovery import registry\n"
        "@hookimpl\ndef vlp_scorers(): registry()",
    )
    monkeypatch.setattr(plugins, "_registry", None)
    found = list(metadata.distributions(path=[str(site.folder)]))
    monkeypatch.setattr(plugins.metadata, "distributions", lambda: found)
    error = report_of(registry(), "impatient").error
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
    names = site.discover("acme").names("scorers")
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
