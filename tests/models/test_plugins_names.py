"""What happens when two plug-ins want the same name: order decides nothing."""

import logging

import pytest
from outsiders import SCORER, report_of

from vlp_plugins.methods.resolve import make_method
from vlp_plugins.runtime.errors import UnknownNameError


def test_a_built_in_keeps_its_bare_name(site, caplog):
    site.install("acme", SCORER % "lamp")
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        registry = site.discover()

    assert type(make_method(registry, "lamp").score).__name__ == "Lamp"
    assert type(make_method(registry, "acme:lamp").score).__name__ == "Smallest"
    report = report_of(registry, "acme")
    assert report.registered == {"scorers": ("acme:lamp",)}
    assert "'lamp' clashes with the built-in scorer: use 'acme:lamp'" in report.notes[0]
    assert report.notes[0] in caplog.text


def test_a_scorer_clashes_with_a_method_because_it_is_one(site):
    site.install("acme", SCORER % "omp")
    registry = site.discover()
    assert type(make_method(registry, "omp").score).__name__ == "Magnitude"
    assert type(make_method(registry, "acme:omp").score).__name__ == "Smallest"
    with pytest.raises(UnknownNameError, match="must be named in full: 'acme:omp'"):
        registry.find("omp", "scorers")


@pytest.mark.parametrize("order", [("acme", "umbrella"), ("umbrella", "acme")])
def test_two_outsiders_with_one_name_are_both_named_in_full(site, order):
    for distribution in order:
        site.install(distribution, SCORER % "same")
    registry = site.discover()

    assert {"acme:same", "umbrella:same"} <= set(registry.method_names())
    for distribution in order:
        method = make_method(registry, f"{distribution}:same")
        assert type(method.score).__module__ == f"{distribution}_plugin"
    with pytest.raises(UnknownNameError, match="'acme:same' or 'umbrella:same'"):
        make_method(registry, "same")


def test_the_full_name_is_understood_without_a_clash_too(site):
    site.install("Acme_Scores", SCORER % "smallest")
    assert make_method(site.discover(), "acme-scores:smallest").name == "acme-scores:smallest"


def test_two_plugins_of_one_distribution_with_one_name_stay_apart(site):
    site.install("acme", SCORER % "same")
    site.install("other", SCORER % "same")
    (site.folder / "acme-1.0.dist-info" / "entry_points.txt").write_text(
        "[vlp_plugins]\none = acme_plugin\ntwo = other_plugin\n"
    )
    (site.folder / "other-1.0.dist-info" / "entry_points.txt").unlink()
    names = site.discover().names("scorers")
    assert {"acme:one:same", "acme:two:same"} <= set(names)


def test_the_second_plugin_of_one_name_is_called_after_its_distribution(site):
    site.install("umbrella", SCORER % "b", entry="extra")
    site.install("acme", SCORER % "a", entry="extra")
    registry = site.discover()
    assert report_of(registry, "extra").distribution == "acme"
    assert report_of(registry, "umbrella:extra").registered == {"scorers": ("b",)}
