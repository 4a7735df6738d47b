"""Information flow: the score of MULTIFLOW."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.calibration.moments import (
    INPUT_SECOND_MOMENT,
    ActivationStatistic,
    InputSecondMoment,
)
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.score import Evidence, Scorer, in_range


def neuron_saliency(
    weight: torch.Tensor, second_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much a layer's neurons emit and receive: the node term of MULTIFLOW.

    Args:
        weight: `[out, in]`, any floating dtype.
        second_moment: `[in]`, a_j^2.

    Returns:
        float32: of the outputs, I_i = mean_j |W_ij| a_j, `[out]`; of the inputs,
        I_j = mean_i |W_ij| a_j, `[in]`.
    """
    return _saliency(in_range(weight.float().abs()), second_moment)


def _saliency(
    magnitude: torch.Tensor, second_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    norm = in_range(second_moment.sqrt()).to(magnitude.device, torch.float32)
    return (magnitude @ norm) / magnitude.shape[1], magnitude.mean(0) * norm


def information_flow(
    weight: torch.Tensor, second_moment: torch.Tensor, *, edges: bool = True, nodes: bool = True
) -> torch.Tensor:
    """I_i * I_j * |W_ij| (Farina et al., CVPR 2024, section 4).

    Args:
        weight: `[out, in]`, any floating dtype.
        second_moment: `[in]`, a_j^2: mean over samples of the squared input j, summed over tokens.
        edges: multiply by |W_ij|.
        nodes: multiply by the saliency of both neurons.

    Returns:
        float32, `[out, in]`.
    """
    magnitude = weight.float().abs()
    if not nodes:
        return magnitude
    magnitude = in_range(magnitude)
    emitted, received = _saliency(magnitude, second_moment)
    if not edges:
        return torch.outer(emitted, received)
    # In place: a second tensor of this size costs more time than the arithmetic.
    return magnitude.mul_(emitted[:, None]).mul_(received)


class InformationFlow(Scorer):
    """The score of MULTIFLOW (Farina et al., CVPR 2024), to be compared within a layer.

    The scale of a_j differs from layer to layer.

    Attributes:
        edges: use the importance of connections (the paper's Table 8 leaves out either).
        nodes: use the saliency of neurons.
    """

    name: ClassVar[str] = "information_flow"
    needs: ClassVar[tuple[ActivationStatistic, ...]] = (InputSecondMoment(),)

    def __init__(self, *, edges: bool = True, nodes: bool = True) -> None:
        if not (edges or nodes):
            raise UnsupportedError("information_flow needs edges, nodes or both")
        self.edges = edges
        self.nodes = nodes

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return information_flow(
            weight, evidence.statistics[INPUT_SECOND_MOMENT], edges=self.edges, nodes=self.nodes
        )

    def neurons(
        self, weight: torch.Tensor, evidence: Evidence
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The node term itself, `neuron_saliency`; with `nodes=False` means of the edges' scores.

        The paper names it as the way to structured pruning, which it leaves to others.
        """
        if not self.nodes:
            return super().neurons(weight, evidence)
        return neuron_saliency(weight, evidence.statistics[INPUT_SECOND_MOMENT])
