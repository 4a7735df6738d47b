"""The published methods that are compositions of a score and an allocation."""

from __future__ import annotations

from vlp_plugins.methods.composition import Composition
from vlp_plugins.scoring.allocation import ModalityAllocation, RowAllocation
from vlp_plugins.scoring.information_flow import InformationFlow
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.wanda import Wanda


def omp() -> Composition:
    """One-shot magnitude pruning: magnitude x global."""
    return Composition("omp", Magnitude())


def multiflow(*, edges: bool = True, nodes: bool = True) -> Composition:
    """MULTIFLOW (Farina et al., CVPR 2024): information flow within layers, magnitude between.

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
    """Wanda (Sun et al., ICLR 2024): |w| times input norm, compared per output neuron."""
    return Composition("wanda", Wanda(), RowAllocation())
