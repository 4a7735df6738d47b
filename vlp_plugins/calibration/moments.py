"""Statistics that a data pass accumulates: second moments of inputs, mean gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import UnsupportedError


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """Where a statistic is taken: one use of one weight in one stream.

    Attributes:
        weight: canonical name.
        stream: name of the stream of the activation probe.
        owner: index of the module among the weight's owners; 0 is the published owner.
    """

    weight: str
    stream: str
    owner: int

    def __str__(self) -> str:
        return f"{self.weight}|{self.stream}|{self.owner}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Inverse of `str`."""
        weight, stream, owner = text.rsplit("|", 2)
        return cls(weight, stream, int(owner))


Key = tuple[str, Site]
"""Name of the statistic, and site: the key of a sum."""


def sums_of(
    sums: Mapping[Key, torch.Tensor], statistic: str, weight: str, owners: Literal["all", "first"]
) -> dict[Site, torch.Tensor]:
    """The sums of one statistic of one weight by site, of all its owners or of the first."""
    sites = (
        site
        for name, site in sums
        if name == statistic and site.weight == weight and (owners == "all" or site.owner == 0)
    )
    # Sorted, so that the last bit does not depend on the order in which sites ran.
    return {site: sums[statistic, site] for site in sorted(sites)}


class ActivationStatistic(ABC):
    """A statistic of the inputs of a weight, additive over batches.

    Because it is additive, a pass is streaming, resumable and the same on any number of processes:
    accumulators are float64 sums of per-batch values.

    Attributes:
        name: key of its sums, in files, too. It must contain every parameter that changes the
            values (`f"input_power_{p}"`, set in `__init__`): statistics of one name share one set
            of sums. Without `|`.
        block_dtype: of its sums in the block-by-block pass.
    """

    name: str
    block_dtype: ClassVar[torch.dtype] = torch.float64

    @abstractmethod
    def size(self, weight: Weight) -> int:
        """Length of the accumulator of one site of `weight`."""

    @abstractmethod
    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        """The contribution of one call.

        Args:
            inputs: `[tokens, in_features]`, the real tokens that entered the layer, in the
                model's dtype.

        Returns:
            `[size]` in float32 (summed in float64 by the caller).
        """


class LossStatistic(ABC):
    """A statistic of the gradients of the pre-training loss, additive over batches.

    Attributes:
        name: see `ActivationStatistic.name`.
    """

    name: str

    @abstractmethod
    def size(self, weight: Weight) -> int:
        """Length of the accumulator of `weight`."""

    @abstractmethod
    def measure(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The contribution of one batch.

        Args:
            weight: detached, of the parameter's shape.
            gradient: of the batch's loss by the weight, summed over all uses of the weight, same
                shape, float32.

        Returns:
            `[size]`, float32 (summed in float64 by the caller); may be a view of `gradient`.
        """


Statistic = ActivationStatistic | LossStatistic
_Kind = TypeVar("_Kind", bound=Statistic)

LOSS_STREAM = "loss"
"""Stream of the sites of loss statistics: one per weight, whatever modules use it."""


def distinct(statistics: Iterable[_Kind]) -> tuple[_Kind, ...]:
    """Each statistic once, by its name.

    Raises:
        UnsupportedError: if two of one name are not the same.
    """
    found: dict[str, _Kind] = {}
    for statistic in statistics:
        known = found.setdefault(statistic.name, statistic)
        if known is not statistic and _identity(known) != _identity(statistic):
            raise UnsupportedError(
                f"two statistics are called {statistic.name!r}, but one is {_described(known)} and "
                f"one {_described(statistic)}; the name of a statistic must contain its parameters"
            )
    return tuple(found.values())


def _identity(statistic: Statistic) -> tuple[type, dict[str, object]]:
    return type(statistic), getattr(statistic, "__dict__", {})


def _described(statistic: Statistic) -> str:
    kind, parameters = _identity(statistic)
    return f"{kind.__name__}({', '.join(f'{k}={v!r}' for k, v in parameters.items())})"


INPUT_SECOND_MOMENT = "input_second_moment"

# Elements of the block that squares are added into: 256 KiB of float32, so that the block and the
# rows that it reads stay in a core's cache. A reduction over dimension 0 of the whole tensor
# (vecdot, (x * x).sum(0)) writes its squares to memory first and took up to 25 times as long on
# [4616, 3072]; einsum and vector_norm walk down columns and took still longer.
_BLOCK = 1 << 16


def sum_of_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared inputs.

    On CPU row r of a small block sums the tokens r, r + rows, r + 2 * rows, ..., then the rows are
    added: short sums in float32 lose less than one long one, and no temporary has the size of the
    input.

    Args:
        inputs: `[tokens, in_features]`, any floating dtype.

    Returns:
        `[in_features]`, float32.
    """
    if inputs.device.type != "cpu":
        values = inputs.float()
        return torch.linalg.vecdot(values, values, dim=0)
    tokens, features = inputs.shape
    rows = max(1, min(tokens, max(8, _BLOCK // max(1, features))))
    block = inputs.new_zeros((rows, features), dtype=torch.float32)
    full = tokens - tokens % rows
    for part in inputs[:full].view(-1, rows, features).unbind(0):
        values = part.float()
        block.addcmul_(values, values)
    if full < tokens:
        values = inputs[full:].float()
        block[: tokens - full].addcmul_(values, values)
    return block.sum(0)


class InputSecondMoment(ActivationStatistic):
    """Sum over samples and real tokens of x_j^2, per input feature j.

    Divided by the number of samples it is a_j^2 of MULTIFLOW (Farina et al., CVPR 2024): the
    published code divides by samples, not tokens (quirk multiflow-M1); within a tensor only ratios
    matter.
    """

    name = INPUT_SECOND_MOMENT

    def size(self, weight: Weight) -> int:
        return weight.rows_and_columns[1]

    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        return sum_of_squares(inputs)


INPUT_GRAM = "input_gram"
_GRAM_PARTS, _LEAST_PART = 8, 128


def add_gram(total: torch.Tensor, inputs: torch.Tensor) -> None:
    """Adds X'X in place, the parts on and below the diagonal alone; `mirror` makes it whole.

    One product per part takes little more than half the time of the whole product.

    Args:
        total: float32 `[in_features, in_features]`.
        inputs: X, `[tokens, in_features]`, any floating dtype.
    """
    values = inputs.float()
    for rows in _parts(len(total)):
        total[rows, : rows.stop].addmm_(values[:, rows].T, values[:, : rows.stop])


def mirror(total: torch.Tensor) -> torch.Tensor:
    """Writes what `add_gram` left out, in place, and returns it."""
    for rows in _parts(len(total)):
        total[: rows.start, rows] = total[rows, : rows.start].T
    return total


def _parts(features: int) -> list[slice]:
    size = max(_LEAST_PART, -(-features // _GRAM_PARTS))
    return [slice(first, min(first + size, features)) for first in range(0, features, size)]


class InputGram(ActivationStatistic):
    """Sum over real tokens of x x', the Gram matrix of a layer's inputs, for layer-wise solvers.

    `[in_features, in_features]`, flattened: of an input of 3,072 features 75 MB in float64.
    """

    name = INPUT_GRAM
    block_dtype = torch.float32

    def size(self, weight: Weight) -> int:
        return weight.rows_and_columns[1] ** 2

    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        features = inputs.shape[1]
        total = inputs.new_zeros((features, features), dtype=torch.float32)
        add_gram(total, inputs)
        return mirror(total).flatten()


MEAN_GRADIENT = "mean_gradient"


class MeanGradient(LossStatistic):
    """Sum over batches of dL_b/dW, L_b the loss of batch b; the mean divides by the batches.

    The losses are means over a batch, so batches of any size count alike. A weight that
    several modules use has the sum of the gradients of all uses.
    """

    name = MEAN_GRADIENT

    def size(self, weight: Weight) -> int:
        return weight.numel

    def measure(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flatten()
