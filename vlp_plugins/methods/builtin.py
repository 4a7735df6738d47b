"""The plug-in of our own scores, solvers, methods and hosts, registered as anyone else's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from vlp_plugins.calibration.amia import Amia
from vlp_plugins.calibration.selections import (
    AllTokens,
    Atv,
    ImageTokens,
    TextTokens,
    TokenSelection,
)
from vlp_plugins.hookspecs import hookimpl
from vlp_plugins.methods.chita.method import chita, chita_plus_plus
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.gradual.method import platon, taylor
from vlp_plugins.methods.iterative import itersnip
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.reconstruction.alps import Alps, AlpsPlus
from vlp_plugins.methods.reconstruction.layer import Refit, Solver
from vlp_plugins.methods.reconstruction.sparsegpt import SparseGpt
from vlp_plugins.methods.tamt.method import lamp_tamt, tamt
from vlp_plugins.scoring.allocation import (
    Allocation,
    GlobalAllocation,
    IdAllocation,
    LayerAllocation,
    ModalityAllocation,
    RowAllocation,
)
from vlp_plugins.scoring.das import Das
from vlp_plugins.scoring.ecoflap import Ecoflap
from vlp_plugins.scoring.information_flow import InformationFlow
from vlp_plugins.scoring.lamp import Lamp
from vlp_plugins.scoring.magnitude import LayerL2, Magnitude, Random
from vlp_plugins.scoring.owl import Owl
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.snip import Snip
from vlp_plugins.scoring.wanda import Wanda

Part = TypeVar("Part")


def omp() -> Composition:
    """Magnitude pruning in one shot: remove the smallest weights of the whole model."""
    return Composition("omp", Magnitude())


def multiflow(*, edges: bool = True, nodes: bool = True) -> Composition:
    """MULTIFLOW (Farina et al., CVPR 2024): the information that flows through each weight.

    Each modality is pruned to the target; inside a modality, layers keep as many elements as
    global magnitude pruning of that modality would leave them; inside a layer the elements with
    the greatest information flow stay.

    Args:
        edges: use the importance of connections.
        nodes: use the saliency of neurons.
    """
    return Composition(
        "multiflow",
        InformationFlow(edges=edges, nodes=nodes),
        ModalityAllocation(),
        allocation_score=Magnitude(),
        parameters={"edges": edges, "nodes": nodes},
    )


def wanda() -> Composition:
    """Wanda (Sun et al., ICLR 2024): magnitude times input norm, within each output neuron."""
    return Composition("wanda", Wanda(), RowAllocation())


def atv(*, alpha: float = 1.0) -> Composition:
    """ATV-Pruning (Li et al., CVPR 2026): Wanda on text and the visual tokens that drift most.

    Block by block: drift of a visual token is how far the unpruned block turns it; the more visual
    tokens drift in a block, the more of them count.

    Args:
        alpha: how many visual tokens count; 0 leaves text alone.
    """
    return Composition(
        "atv", Wanda(), RowAllocation(), tokens=Atv(alpha), parameters={"alpha": alpha}
    )


def tamp() -> Composition:
    """TAMP (Lee et al., Findings of ACL 2025): Wanda on few tokens, budgets by how outputs vary.

    The allocation `das` gives layers whose outputs vary more, within text or images and between
    them, more weights; block by block the token selection `amia` chooses for every layer the tokens
    that attention and variety call for.
    """
    return Composition("tamp", Wanda(), Das(even=RowAllocation()), tokens=Amia())


def _by_name(*classes: Callable[..., Part]) -> dict[str, Callable[..., Part]]:
    return {each.name: each for each in classes}  # type: ignore[attr-defined]


@hookimpl
def vlp_scorers() -> Mapping[str, Callable[..., Scorer]]:
    """Scores; each is also a method of its name with global allocation."""
    return _by_name(Random, Magnitude, Lamp, LayerL2, Wanda, InformationFlow, Snip)


@hookimpl
def vlp_allocations() -> Mapping[str, Callable[..., Allocation]]:
    """Allocations; a pattern is written `keep=2,of=4` and has no name."""
    plain = _by_name(GlobalAllocation, ModalityAllocation, LayerAllocation, RowAllocation)
    return plain | _by_name(IdAllocation, Owl, Das, Ecoflap)


@hookimpl
def vlp_token_selections() -> Mapping[str, Callable[..., TokenSelection]]:
    """Which tokens of a block count, in a block-by-block pass."""
    return _by_name(AllTokens, TextTokens, ImageTokens, Atv, Amia)


@hookimpl
def vlp_methods() -> Mapping[str, Callable[..., Method]]:
    """Methods that are more than a score with global allocation."""
    return {
        "omp": omp,
        "multiflow": multiflow,
        "wanda": wanda,
        "atv": atv,
        "tamp": tamp,
        "itersnip": itersnip,
        "tamt": tamt,
        "lamp-tamt": lamp_tamt,
        "taylor": taylor,
        "platon": platon,
        "chita": chita,
        "chita++": chita_plus_plus,
    }


@hookimpl
def vlp_solvers() -> Mapping[str, Callable[..., Solver]]:
    """Layer-wise solvers; each is also a method of its name."""
    return _by_name(SparseGpt, Alps, AlpsPlus, Refit)


@hookimpl
def vlp_hosts() -> Mapping[str, Callable[[], Any]]:
    """Hosts by the name of the framework; what is returned is a module of `vlp_plugins.hosts`."""
    modules = {"nni": "nni", "torch-pruning": "torch_pruning", "transformers": "transformers"}
    return {name: _importing(f"vlp_plugins.hosts.{module}") for name, module in modules.items()}


def _importing(module: str) -> Callable[[], Any]:
    """Imports a host by name: plug-ins stand below hosts, and most users lack most frameworks."""
    return lambda: import_module(module)
