"""A score under which what was removed once goes first ever after."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlp_plugins.scoring.score import Evidence, Scorer

LEAST = torch.finfo(torch.float32).min
"""Below every score. Finite, because an infinite score is a mistake of a scorer."""


class Survivors(Scorer):
    """Another score, with dead elements below everything that is alive.

    A score of a dead weight, |g * 0| say, may be no less than that of a weight that lives.
    """

    name = "survivors"
    elementwise = False  # a sample of a weight does not tell which elements it is of

    def __init__(
        self, scorer: Scorer, alive: Mapping[str, torch.Tensor], dead: float = LEAST
    ) -> None:
        """Wraps a scorer.

        Args:
            scorer: ranks what is alive.
            alive: by canonical name a bool mask of the weight's shape, true where it is kept so
                far.
            dead: score of what is not; the published code's are 0 wherever the weight is.
        """
        self.name = scorer.name  # type: ignore[misc]
        self.needs = scorer.needs  # type: ignore[misc]
        self._dead = dead
        self._scorer = scorer
        self._alive = alive

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        alive = self._alive[evidence.name].to(weight.device).view(weight.shape)
        return self._scorer.score(weight, evidence).masked_fill(~alive, self._dead)
