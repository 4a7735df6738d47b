"""Everything that a plug-in may import, to make scores, solvers, methods, adapters and hosts.

    from vlp_plugins.extend import Scorer, hookimpl

Every name is documented where it is defined. `vlp_plugins.hookspecs` says how a plug-in registers
what it makes.
"""

from __future__ import annotations

from vlp_plugins.calibration.block_gradients import GradientRows
from vlp_plugins.calibration.moments import (
    INPUT_SECOND_MOMENT,
    MEAN_GRADIENT,
    ActivationStatistic,
    InputSecondMoment,
    LossStatistic,
    MeanGradient,
)
from vlp_plugins.calibration.selections import BlockCall, SelectionState, TokenSelection
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.hookspecs import hookimpl
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Cost, Method, Procedure
from vlp_plugins.methods.reconstruction.layer import Layer, Reconstructed, Solver
from vlp_plugins.methods.reconstruction.method import Reconstruction
from vlp_plugins.models.adapter import (
    Adapter,
    AnsweringAdapter,
    Batch,
    CaptioningAdapter,
    ClassifyingAdapter,
    Exclusion,
    ImageTokensAdapter,
    MatchingAdapter,
    Negatives,
    OriginalPart,
    Owner,
    Places,
    RetrievalAdapter,
    StatementAdapter,
    Stream,
    TokenKind,
    WeightSpec,
    WeightView,
    need,
)
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.parts import Attention, Block, FeedForward, Part
from vlp_plugins.models.request import Target
from vlp_plugins.models.restricted import DelegatingAdapter
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import (
    BatchError,
    DataError,
    MaskError,
    NonFiniteError,
    SparsityError,
    StatisticsError,
    StructureError,
    TieError,
    UnclaimedModelError,
    UnknownNameError,
    UnsupportedError,
    VlpError,
)
from vlp_plugins.scoring.allocation import (
    Allocation,
    EvenAllocation,
    GlobalAllocation,
    LayerAllocation,
    ModalityAllocation,
    Pattern,
    RowAllocation,
    shares,
)
from vlp_plugins.scoring.budgets import GroupAllocation, Groups
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Evidence, MagnitudeRanked, Scorer
from vlp_plugins.scoring.selection import Scored, Selection

__all__ = [
    "INPUT_SECOND_MOMENT",
    "MEAN_GRADIENT",
    "ActivationStatistic",
    "Adapter",
    "Allocation",
    "AnsweringAdapter",
    "Attention",
    "Batch",
    "BatchError",
    "Block",
    "BlockCall",
    "CaptioningAdapter",
    "ClassifyingAdapter",
    "Composition",
    "Context",
    "Cost",
    "DataError",
    "DelegatingAdapter",
    "EvenAllocation",
    "Evidence",
    "Exclusion",
    "Factors",
    "FeedForward",
    "GlobalAllocation",
    "GradientRows",
    "GroupAllocation",
    "Groups",
    "ImageTokensAdapter",
    "InputSecondMoment",
    "Layer",
    "LayerAllocation",
    "LossStatistic",
    "Magnitude",
    "MagnitudeRanked",
    "MaskError",
    "Masks",
    "MatchingAdapter",
    "MeanGradient",
    "Method",
    "ModalityAllocation",
    "ModuleAdapter",
    "Negatives",
    "NonFiniteError",
    "OriginalPart",
    "Owner",
    "Part",
    "Pattern",
    "Places",
    "Procedure",
    "Reconstructed",
    "Reconstruction",
    "RetrievalAdapter",
    "RowAllocation",
    "Scored",
    "Scorer",
    "Selection",
    "SelectionState",
    "Solver",
    "SparsityError",
    "StatementAdapter",
    "Statistics",
    "StatisticsError",
    "Stream",
    "StructureError",
    "Target",
    "TieError",
    "TokenKind",
    "TokenSelection",
    "UnclaimedModelError",
    "UnknownNameError",
    "UnsupportedError",
    "VlpError",
    "Weight",
    "WeightMap",
    "WeightSpec",
    "WeightView",
    "hookimpl",
    "need",
    "restored",
    "shares",
]
