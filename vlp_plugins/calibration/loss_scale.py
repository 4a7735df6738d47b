"""The factor that keeps float16 gradients within the range of float16."""

from __future__ import annotations

_HIGHEST = 2.0**16
_LOWEST = 2.0**-8
_STEP = 2.0**-4


class LossScale:
    """What a loss is multiplied by before its backward, and its gradients divided by after.

    Powers of two, so that nothing but underflow and overflow changes. Every batch starts at the
    same scale: gradients must not depend on the batches that a process has seen before.

    Attributes:
        value: the factor.
    """

    def __init__(self) -> None:
        self.value = _HIGHEST

    def lower(self) -> bool:
        """Makes the factor smaller after an overflow; False if it is the least already."""
        if self.value <= _LOWEST:
            return False
        self.value = max(_LOWEST, self.value * _STEP)
        return True
