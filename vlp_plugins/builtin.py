"""The plug-in of our own scores, methods and hosts: registered exactly as an outsider's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from vlp_plugins.hookspecs import hookimpl
from vlp_plugins.methods import compositions
from vlp_plugins.methods.base import Method
from vlp_plugins.methods.chita.factories import chita, chita_plus_plus
from vlp_plugins.methods.iterative import itersnip
from vlp_plugins.methods.tamt import lamp_tamt, tamt
from vlp_plugins.scoring.information_flow import InformationFlow
from vlp_plugins.scoring.lamp import Lamp
from vlp_plugins.scoring.magnitude import LayerL2, Magnitude, Random
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.snip import Snip
from vlp_plugins.scoring.wanda import Wanda
from vlp_plugins.training.named import platon, taylor


@hookimpl
def vlp_scorers() -> Mapping[str, Callable[..., Scorer]]:
    """Scores; each is also a method of its name with global allocation."""
    scorers: tuple[type[Scorer], ...] = (
        Random,
        Magnitude,
        Lamp,
        LayerL2,
        Wanda,
        InformationFlow,
        Snip,
    )
    return {scorer.name: scorer for scorer in scorers}


@hookimpl
def vlp_methods() -> Mapping[str, Callable[..., Method]]:
    """Methods that are more than a score with global allocation."""
    return {
        "omp": compositions.omp,
        "multiflow": compositions.multiflow,
        "wanda": compositions.wanda,
        "itersnip": itersnip,
        "tamt": tamt,
        "lamp-tamt": lamp_tamt,
        "taylor": taylor,
        "platon": platon,
        "chita": chita,
        "chita++": chita_plus_plus,
    }


@hookimpl
def vlp_hosts() -> Mapping[str, Callable[[], Any]]:
    """Hosts by the name of the framework; what is returned is a module of `vlp_plugins.hosts`."""
    modules = {"nni": "nni", "torch-pruning": "torch_pruning", "transformers": "transformers"}
    return {name: _importing(f"vlp_plugins.hosts.{module}") for name, module in modules.items()}


def _importing(module: str) -> Callable[[], Any]:
    """Imports a host by name: plug-ins stand below hosts, and most users lack most frameworks."""
    return lambda: import_module(module)
