"""One layer and its solvers' contract: weight, Gram matrix of its inputs, how many elements stay.

A layer maps inputs X `[tokens, in]` to X W'. With the Gram matrix H = X'X the squared error of
other weights V is tr((W - V) H (W - V)'), so a solver needs W and H alone, up to a factor of H.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch

from vlp_plugins.calibration.block_gradients import GradientRows
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError, named_errors
from vlp_plugins.runtime.model_state import fingerprint
from vlp_plugins.scoring.allocation import Allocation, LayerAllocation, RowAllocation
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import Selection
from vlp_plugins.scoring.threshold import top
from vlp_plugins.scoring.wanda import Wanda

_ELEMENTS = 2**24  # of a layer that are solved for at a time, which bounds the memory


@dataclass(frozen=True)
class Largest:
    """Keeps the largest elements of the whole tensor, all but `remove`."""

    remove: int

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """True where an element stays; equal scores go by position."""
        flat = scores.flatten().float()
        return top(flat, flat.numel() - self.remove).view(scores.shape)


@dataclass(frozen=True)
class Layer:
    """What a solver knows.

    Attributes:
        weight: W, float32 `[out, in]`.
        gram: H, `[in, in]`, floating, symmetric and positive semidefinite; its scale is free.
        rows: dL_b/dW of every batch b by the dense weights, floating `[batches, out, in]`, for
            solvers that ask for them (`Solver.gradients`); None for others.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    rows: torch.Tensor | None = None

    def __post_init__(self) -> None:
        inputs = self.weight.shape[1]
        if self.gram.shape != (inputs, inputs):
            raise UnsupportedError(
                f"a Gram matrix {list(self.gram.shape)} does not fit weights of {inputs} inputs"
            )
        squares = self.gram.diagonal()
        if not bool(torch.isfinite(self.gram.sum())):
            raise NonFiniteError(
                "the Gram matrix of a layer's inputs holds NaN or infinity; look at the batches "
                "and at the checkpoint"
            )
        if not bool((squares > 0).any()):
            raise UnsupportedError(
                "all inputs of a layer are zero, so nothing tells its weights apart; give other "
                "batches, exclude the layer, or take a method that reads no inputs"
            )

    def error(self, weight: torch.Tensor) -> float:
        """Squared error of other weights over the squared output; 0 for the same weights."""
        exact, change = self.gram.double(), (weight - self.weight).double()
        dense = self.weight.double()
        return float((change @ exact).mul_(change).sum() / (dense @ exact).mul_(dense).sum())

    def scaled(self, mean: float, own: float = 0.0, dtype: torch.dtype = torch.float64) -> Scaled:
        """The damped layer in coordinates where every input has the same norm.

        Args:
            mean: what is added to the diagonal of H, in means of the diagonal.
            own: the same in the diagonal's own elements: what an input's noise of this share of
                its power would add.
            dtype: of the result.
        """
        gram = self.gram.to(dtype, copy=True)
        squares = gram.diagonal().clone()
        gram.diagonal().add_(mean * squares.mean() + own * squares)
        norms = gram.diagonal().sqrt() + 1e-8 * squares.mean().sqrt()
        gram.div_(norms).div_(norms[:, None])
        return Scaled(gram, self.weight.to(dtype) * norms, norms)


def cholesky(matrix: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
    """The lower Cholesky factor of a symmetric matrix, in its place: no second one is held.

    Args:
        matrix: makes it, contiguous, in a number format; it may be overwritten. float32 is tried
            first, float64 where rounding leaves it not positive definite.

    Returns:
        L with L L' the matrix, zero above its diagonal.

    Raises:
        UnsupportedError: if it is not positive definite.
    """
    for dtype in (torch.float32, torch.float64):
        turned = matrix(dtype).mT  # as LAPACK has it: column by column
        status = torch.empty((), dtype=torch.int32, device=turned.device)
        torch.linalg.cholesky_ex(turned, out=(turned, status))
        if not int(status):
            return turned
        del turned  # before the next one is made
    raise UnsupportedError(
        "the damped Gram matrix of a layer is not positive definite; give a larger damping"
    )


@dataclass(frozen=True)
class Scaled:
    """A layer in coordinates where the (damped) Gram matrix has a diagonal of about 1.

    Attributes:
        gram: float64 or float32 `[in, in]`.
        weight: of the same, `[out, in]`.
        norms: what weights were multiplied by, of the same, `[in]` or `[out, in]`.
    """

    gram: torch.Tensor
    weight: torch.Tensor
    norms: torch.Tensor

    @property
    def parts(self) -> list[slice]:
        """The rows, as many at a time as are solved for; they do not depend on each other."""
        most = max(1, _ELEMENTS // self.weight.shape[1])
        return [slice(at, at + most) for at in range(0, len(self.weight), most)]

    def _rows(self, part: slice) -> Scaled:
        """The layer of some outputs."""
        norms = self.norms[part] if self.norms.ndim == 2 else self.norms
        return replace(self, weight=self.weight[part], norms=norms)

    def product(self, values: torch.Tensor) -> torch.Tensor:
        """Each row of `values` `[out, in]` times the matrix of its quadratic form."""
        return values @ self.gram

    def shifted(self, rho: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """Solves for rows x of x (H + rho I) = y; the right-hand side may be overwritten."""

        def matrix(dtype: torch.dtype) -> torch.Tensor:
            shifted = self.gram.to(dtype, copy=True)
            shifted.diagonal().add_(rho)
            return shifted

        factor = cholesky(matrix)

        def solve(values: torch.Tensor) -> torch.Tensor:
            found = values.to(factor.dtype)
            for upper in (True, False):  # `cholesky_solve` would copy the factor
                triangle = factor.mT if upper else factor
                found = torch.linalg.solve_triangular(triangle, found, upper=upper, left=False)
            return found.to(values.dtype)

        return solve

    def refitted(
        self, support: torch.Tensor, start: torch.Tensor, *, tolerance: float, steps: int
    ) -> torch.Tensor:
        """The least squares on a support, in the original coordinates, by conjugate gradients.

        All rows at once, each with its own step; the support is never left.

        Args:
            support: bool `[out, in]`.
            start: `[out, in]`, in scaled coordinates; read on the support.
            tolerance: a row stops where its residual is this share of that at zero.
            steps: at most.

        Returns:
            float32 `[out, in]`, zero outside the support.
        """
        if len(self.parts) > 1:
            found = torch.empty(support.shape, device=support.device)
            for part in self.parts:
                found[part] = self._rows(part).refitted(
                    support[part], start[part], tolerance=tolerance, steps=steps
                )
            return found
        dtype = self.weight.dtype
        inside = support.to(dtype)
        target = self.product(self.weight) * inside
        found = start.to(dtype) * inside
        residual = target - self.product(found) * inside
        direction = residual.clone()
        power = residual.square().sum(1, keepdim=True)
        enough = tolerance**2 * target.square().sum(1, keepdim=True)
        for _ in range(steps):
            running = power > enough
            if not bool(running.any()):
                break
            image = self.product(direction).mul_(inside)
            curvature = (direction * image).sum(1, keepdim=True)
            # A row that is solved to the last bit has nothing left to divide by.
            running &= curvature > torch.finfo(dtype).tiny
            length = torch.where(running, power / curvature, 0.0)
            found += length * direction
            residual -= length * image
            new = residual.square().sum(1, keepdim=True)
            direction.mul_(torch.where(running, new / power, 0.0)).add_(residual)
            power = new
        return found.div_(self.norms).float()


Reconstructed = tuple[torch.Tensor, torch.Tensor]
"""Support, bool `[out, in]`, and values, float32 `[out, in]`, zero outside of it."""


class Solver(ABC):
    """Chooses which elements of a layer stay, and their values. It knows no model.

    Registered by `vlp_solvers` it is a method of its name. How many elements each layer keeps, the
    allocation says; the solver is called for one layer after the other.

    Attributes:
        name: the name it is registered under.
        score: ranks elements where the allocation compares them; `solve` gets what it says.
        allocation: of the method, unless the user names another one.
        internal: attributes of an instance that are no parameters of the name.
    """

    name: ClassVar[str]
    score: ClassVar[Scorer] = Magnitude()
    allocation: ClassVar[Allocation] = LayerAllocation()
    internal: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def solve(
        self, layer: Layer, scores: torch.Tensor, selections: Sequence[Selection]
    ) -> list[Reconstructed]:
        """One reconstruction for every selection.

        Args:
            layer: of the dense weights; its tensors are not to be changed, nor are the scores.
            scores: float32 `[out, in]` of the method's score, for solvers that refit a mask.
            selections: each says how many elements go (`remove`), of the tensor, of every row or
                of every group of inputs; its `mask` chooses the largest under that rule.

        Returns:
            By selection the support, bool `[out, in]`, and the values, floating `[out, in]`, which
            are read on the support alone.
        """

    @property
    def gradients(self) -> GradientRows | None:
        """The gradients that `Layer.rows` must hold, in a walk by blocks; None for none."""
        return None

    def as_published(self) -> Solver | None:
        """The same as the published code does it; None if there is none."""
        return None

    def record(self) -> dict[str, Any]:
        """Its parameters, which mask files keep: by default the attributes of the instance."""
        known = dict(vars(self))
        if is_dataclass(self):  # which may have slots
            known |= {each.name: getattr(self, each.name) for each in fields(self)}
        return {k: v for k, v in known.items() if k not in self.internal and not k.startswith("_")}


def solved(
    solver: Solver,
    layer: Layer,
    scores: torch.Tensor,
    selections: Sequence[Selection],
    *,
    exact: bool = True,
) -> list[Reconstructed]:
    """What a solver returns, checked.

    Args:
        solver: of whatever origin.
        layer: see `Solver.solve`.
        scores: see `Solver.solve`.
        selections: see `Solver.solve`.
        exact: False lets it keep another number than it was asked for, as published code does.

    Raises:
        UnsupportedError: if it returns anything but what `Solver.solve` says, changes what it is
            given, raises an error that is not ours, or ends the program.
        NonFiniteError: if a value that stays is NaN or infinite in float32.
    """
    given = {
        "the weight": layer.weight,
        "the Gram matrix": layer.gram,
        "the scores": scores,
        "the gradients": layer.rows,
    }
    before = {name: fingerprint((each,)) for name, each in given.items() if each is not None}
    what = f"solver {solver.name!r}"
    with named_errors(what):
        found = solver.solve(layer, scores, selections)
    for name, each in given.items():
        if each is not None and fingerprint((each,)) != before[name]:
            raise UnsupportedError(
                f"{what} changes {name} that it is given; it must work on a copy"
            )
    shape = layer.weight.shape
    if not isinstance(found, Sequence) or len(found) != len(selections):
        raise UnsupportedError(
            f"{what} returned {_described(found)} for {len(selections)} selections; it must return "
            "a list with support and values for each"
        )
    for pair, selection in zip(found, selections, strict=True):
        if not _is_reconstruction(pair, shape):
            raise UnsupportedError(
                f"{what} returned {_described(pair)}; a reconstruction is a support, bool "
                f"{list(shape)}, and values, floating of that shape"
            )
        support, values = pair
        if not bool(torch.isfinite(values[support].float()).all()):
            raise NonFiniteError(
                f"{what} gives NaN or infinite values, in float32; a larger damping, if it has "
                "one, may help"
            )
        kept = int(support.sum())
        if exact and kept + selection.remove != support.numel():
            raise UnsupportedError(
                f"{what} keeps {kept:,} of {support.numel():,} elements, but "
                f"{support.numel() - selection.remove:,} were asked for"
            )
        if exact and not torch.equal(selection.mask(support.float()), support):
            raise UnsupportedError(
                f"{what} keeps as many elements as were asked for, but not by the rule of "
                f"{selection}; the support must be what its `mask` chooses of some scores"
            )
    return list(found)


def _is_reconstruction(pair: object, shape: torch.Size) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    tensors = [each for each in pair if isinstance(each, torch.Tensor) and each.shape == shape]
    return len(tensors) == 2 and tensors[0].dtype == torch.bool and tensors[1].is_floating_point()


def _described(found: object) -> str:
    if isinstance(found, torch.Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    if isinstance(found, Sequence) and not isinstance(found, str) and 0 < len(found) < 4:
        return f"{type(found).__name__} of {', '.join(map(_described, found))}"
    return type(found).__name__


def check_damping(**dampings: float) -> None:
    """Raises `UnsupportedError` for a damping that is no number above 0."""
    for name, value in dampings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UnsupportedError(
                f"{name}={value!r}; give a number above 0 (0.01 is usual): without damping the "
                "weights fit these inputs alone"
            )


@dataclass(frozen=True)
class Refit(Solver):
    """The mask of Wanda, and the least squares on it for the weights that stay.

    Attributes:
        damping: added to the diagonal of the Gram matrix, in means of it.
    """

    name: ClassVar[str] = "refit"
    score: ClassVar[Scorer] = Wanda()
    allocation: ClassVar[Allocation] = RowAllocation()

    damping: float = 0.01

    def __post_init__(self) -> None:
        check_damping(damping=self.damping)

    def solve(
        self, layer: Layer, scores: torch.Tensor, selections: Sequence[Selection]
    ) -> list[Reconstructed]:
        scaled = layer.scaled(self.damping)
        supports = [selection.mask(scores) for selection in selections]
        return [(s, scaled.refitted(s, scaled.weight, tolerance=1e-6, steps=200)) for s in supports]
