"""Pruning while somebody trains: scores fed by the training loop, a schedule, a lock.

`gradual` is what a training loop uses, `rising` the masks behind it, `taylor`, `platon` and
`magnitude` the scores; `procedure` and `named` make methods of them that train by themselves.
"""

from __future__ import annotations

from vlp_plugins.training.base import TrainingScore
from vlp_plugins.training.gradual import GradualPruning
from vlp_plugins.training.magnitude import CurrentMagnitude
from vlp_plugins.training.platon import Platon
from vlp_plugins.training.taylor import Taylor

__all__ = ["CurrentMagnitude", "GradualPruning", "Platon", "Taylor", "TrainingScore"]
