"""Task-agnostic mask training: masks learnt by gradient descent, with a fixed budget of steps.

`procedure` is the method, `training` the loop that all variants share, `scores` what is trained by
default, `published` what the published code trains.
"""

from vlp_plugins.methods.tamt.procedure import Tamt

__all__ = ["Tamt", "tamt"]


def tamt(*, steps: int | None = None, lr: float | None = None) -> Tamt:
    """Task-agnostic mask training (Liu et al., NAACL 2022).

    Args:
        steps: number of steps, one batch each; None: one per batch of the data.
        lr: learning rate of the first step; None: that of the variant.
    """
    return Tamt(steps, lr)
