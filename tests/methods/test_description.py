"""What `vlp methods` says of a method comes from the method itself, an outsider's too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vlp_plugins.methods.description import describe_method, describe_methods
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import UnknownNameError

sys.path.append(str(Path(__file__).parents[1] / "models"))

import outsiders

OURS = registry().method_names()
UNPUBLISHED = {"omp", "magnitude", "random", "lamp-tamt", "alps+", "refit"}


@pytest.mark.parametrize("name", OURS)
def test_ours_say_in_a_line_what_they_do_and_explain_every_setting(name) -> None:
    found = describe_method(registry(), name)
    assert 20 < len(found.summary) < 80
    assert "(" not in found.summary
    assert bool(found.paper) == (name not in UNPUBLISHED)
    assert all(parameter.help for parameter in found.parameters)
    assert not any(parameter.required for parameter in found.parameters)
    assert found.distribution == "vlp-plugins"


def test_names_and_defaults_are_those_that_users_write() -> None:
    found = {p.name: p.default for p in describe_method(registry(), "chita++").parameters}
    assert found["lambda"] == "auto"
    assert found["rounds"] == 8
    found = describe_method(registry(), "tamt")
    assert found.paper == "Liu et al., NAACL 2022"
    assert found.needs == ("data", "gradients", "training")


def test_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'multiflow'"):
        describe_method(registry(), "multflow")


OUTSIDER = '''
class Powers(Magnitude):
    """Powers (Ours et al., 2026): magnitude to a power.

    It is here for
    comparison.

    Args:
        power: the exponent,
            above 0.
        unused: nothing.
    """
    name = "powers"
    def __init__(self, power, unused=float("inf")):
        self.power = power

def silent(**anything):
    return Composition("silent", Magnitude())

def broken():
    """Breaks."""
    raise ValueError("always")

class Undescribed(Magnitude):
    name = "undescribed"

@hookimpl
def vlp_scorers(): return {"powers": Powers, "undescribed": Undescribed}
@hookimpl
def vlp_methods(): return {"silent": silent, "broken": broken}
'''


def test_an_outsider_is_described_too(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    site = outsiders.Site(tmp_path)
    site.install("powers", OUTSIDER)
    importlib.invalidate_caches()
    found = {each.name: each for each in describe_methods(site.discover())}
    powers, silent = found["powers"], found["silent"]
    assert (powers.distribution, found["omp"].distribution) == ("powers", "vlp-plugins")
    assert powers.summary == "Powers: magnitude to a power"
    assert powers.paper == "Ours et al., 2026"
    assert powers.details == ("It is here for comparison.",)
    assert [(p.name, p.required, p.help) for p in powers.parameters] == [
        ("power", True, "the exponent, above 0."),
        ("unused", False, "nothing."),
    ]
    assert powers.method is None  # it cannot be made without a power
    assert powers.needs == ()
    assert (silent.name, silent.summary, silent.parameters) == ("silent", "", ())
    assert silent.method is not None
    assert (found["broken"].summary, found["broken"].method) == ("Breaks", None)
    assert found["undescribed"].summary == "", "what its base class says is about another one"
