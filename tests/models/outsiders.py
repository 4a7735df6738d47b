"""Outsiders as an installer leaves them in a folder: a module and its metadata."""

import importlib
from importlib import metadata
from textwrap import dedent

from vlp_plugins.models.discovery import discover

PREAMBLE = """
from vlp_plugins.extend import Adapter, Composition, Magnitude, hookimpl

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


def report_of(registry, name):
    return next(report for report in registry.plugins() if report.name == name)
