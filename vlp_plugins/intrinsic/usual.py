"""How dimensions are measured where nobody says otherwise."""

from __future__ import annotations

from vlp_plugins.intrinsic.estimate import Estimator
from vlp_plugins.intrinsic.outputs import Padding

PUBLISHED_BLOCKS = 20


def usual_settings(*, published: bool) -> tuple[Estimator, Padding]:
    """The estimator, and what points hold at positions of padding."""
    if published:
        return Estimator(blocks=PUBLISHED_BLOCKS, duplicates="exact"), "published"
    return Estimator(), "real"
