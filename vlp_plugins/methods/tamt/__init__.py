"""Task-agnostic mask training: masks learnt by gradient descent, with a fixed budget of steps.

`procedure` is the method, `training` the loop that all variants share, `scores` what is trained by
default, `published` what the published code trains.
"""

from vlp_plugins.methods.tamt.procedure import Tamt

__all__ = ["Tamt"]
