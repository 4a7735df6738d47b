"""How many batches and samples there were."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tally:
    """Batches and samples, those of batches with an even and with an odd index apart.

    Attributes:
        batches: number of even and of odd batches.
        samples: number of samples in them.
    """

    batches: tuple[int, int] = (0, 0)
    samples: tuple[int, int] = (0, 0)

    def plus(self, index: int, samples: int) -> Tally:
        """With one more batch.

        Args:
            index: of the batch.
            samples: its size.
        """
        return self + Tally(_at(index, 1), _at(index, samples))

    def __add__(self, other: Tally) -> Tally:
        return self._with(other, 1)

    def __sub__(self, other: Tally) -> Tally:
        return self._with(other, -1)

    def _with(self, other: Tally, sign: int) -> Tally:
        (a, b), (c, d) = self.batches, self.samples
        (e, f), (g, h) = other.batches, other.samples
        return Tally((a + sign * e, b + sign * f), (c + sign * g, d + sign * h))


def _at(index: int, value: int) -> tuple[int, int]:
    return (0, value) if index % 2 else (value, 0)
