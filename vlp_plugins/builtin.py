"""The plug-in of our own scores and methods: registered exactly as an outsider's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlp_plugins.hookspecs import hookimpl
from vlp_plugins.methods import compositions
from vlp_plugins.methods.base import Method
from vlp_plugins.methods.chita import chita, chita_plus_plus
from vlp_plugins.methods.iterative import itersnip
from vlp_plugins.methods.tamt import tamt
from vlp_plugins.scorers.base import Scorer
from vlp_plugins.scorers.information_flow import InformationFlow
from vlp_plugins.scorers.lamp import Lamp
from vlp_plugins.scorers.layer_l2 import LayerL2
from vlp_plugins.scorers.magnitude import Magnitude
from vlp_plugins.scorers.random import Random
from vlp_plugins.scorers.snip import Snip
from vlp_plugins.scorers.wanda import Wanda
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
        "taylor": taylor,
        "platon": platon,
        "chita": chita,
        "chita++": chita_plus_plus,
    }
