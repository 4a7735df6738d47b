"""Task-agnostic mask training: masks learnt by gradient descent, with a fixed budget of steps.

`procedure` is the method, `training` the loop that all variants share, `scores` what is trained by
default, `published` what the published code trains.
"""

from vlp_plugins.methods.tamt.procedure import Tamt
from vlp_plugins.scoring.allocation import ModalityAllocation

__all__ = ["Tamt", "lamp_tamt", "tamt"]


def tamt(*, steps: int | None = None, lr: float | None = None) -> Tamt:
    """Task-agnostic mask training (Liu et al., NAACL 2022).

    Args:
        steps: number of steps, one batch each; None: one per batch of the data.
        lr: learning rate of the first step; None: that of the variant.
    """
    return Tamt(steps, lr)


def lamp_tamt(*, steps: int | None = None, lr: float | None = None) -> Tamt:
    """Mask training that starts from LAMP's mask of each modality; of this project, unpublished.

    TAMT's signed scores, but tensors are compared by LAMP (Lee et al., ICLR 2021) at the first
    step, and every modality is pruned to the target as in MULTIFLOW. How it was found, and what
    each of its parts brings: `python -m benchmarks.papers search better --render`.

    Args:
        steps: see `tamt`.
        lr: see `tamt`.
    """
    return Tamt(steps, lr, ModalityAllocation(), start="lamp", called="lamp-tamt")
