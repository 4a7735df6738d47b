"""GradualPruning: pruning in any training loop, attached to its optimizer.

`GradScaler.step` divides the gradients by its scale before it calls the optimizer, which it does
not call at all if one is infinite. Fused optimizers it calls always, with scaled gradients, and
tells them the scale and whether to skip by two attributes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.lock import SparsityLock, held_by_none
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.gradual.rising_masks import Rise, RisingMasks, Timetable, default_warmup
from vlp_plugins.methods.gradual.scores import TrainingScore, training_score
from vlp_plugins.methods.gradual.state import dump, restore
from vlp_plugins.methods.resolve import resolve_adapter, resolve_profile
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.inspection import warn_of_dense
from vlp_plugins.models.request import Target, checked_arguments, target_of
from vlp_plugins.models.weights import WeightMap, uses_of
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import bare, before_updates, unwrapped
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.sharding import zero_outside
from vlp_plugins.scoring.allocation import Allocation, allocation_by_name
from vlp_plugins.scoring.factors import Factors


def _gradients_of(
    weights: WeightMap, uses: Mapping[str, Sequence[nn.Parameter]], optimizer: Optimizer
) -> dict[str, torch.Tensor]:
    """Float32 gradients of a step, summed over the uses; weights without any are absent."""
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    found: dict[str, torch.Tensor] = {}
    for name, parameters in uses.items():
        for parameter in parameters:
            if parameter.grad is None:
                continue
            gradient = weights[name].view_of(parameter.grad.detach()).float()
            if scale is not None:
                gradient = gradient / scale.to(gradient.device)
            found[name] = found[name] + gradient if name in found else gradient
    return found


logger = logging.getLogger("vlp_plugins.methods")

Profile = IdProfile | str | os.PathLike[str]


class GradualPruning:
    """Prunes a model while it is trained, with weights and gradients as they come along.

    Example:
        pruning = vlp.GradualPruning(model, score="platon", sparsity=0.75, steps=10_000)
        pruning.attach(optimizer)
        train(model, optimizer, steps=10_000)  # your training loop, as it is
        masks = pruning.masks()

    Before the optimizer moves the weights it reads the gradients (once per step, however many
    mini-batches were accumulated; `GradScaler`'s scale is taken out), after it it chooses masks if
    the timetable says so. After `steps` less the final warm-up the masks have exactly the target
    sparsity, and from then on `SparsityLock` keeps the zeros, however long the training goes on.

    A removed weight may come back until then: it is set to zero when masks are chosen and trains
    on until the next choice, as in the published code of PLATON, whose magnitude baseline does the
    same. In between the model is therefore not exactly sparse. The published code goes on choosing
    at every step of the final warm-up; here the masks are fixed, so that what is left can recover.
    With `every=1` a removed weight is zero whenever it is looked at, so that only what PLATON
    remembers of it brings it back. With `revive=False` what is removed stays removed, and is zero
    at every step.

    Per element of a weight it keeps one byte and, until the last choice, on the weight's device 4
    bytes for every number that the score remembers and 4 for the samples since the last choice:
    12 for PLATON, 8 for Taylor. Of an optimizer that computes gradients in `step` (a closure) the
    first gradients of a step count, which are those of the weights before it. With several
    processes (DDP) all have the same gradients and find the same masks.
    """

    @checked_arguments
    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: Target,
        steps: int,
        score: str | TrainingScore = "platon",
        warmup: tuple[int, int] | None = None,
        every: int = 10,
        schedule: str = "cubic",
        allocation: str | Allocation = "global",
        floor: float = 0.0,
        revive: bool = True,
        factors: Mapping[str, float] | None = None,
        id_profile: Profile | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Looks at the model; nothing is done to it before `attach`.

        Args:
            model: where and what it will be trained as; wrapped or not.
            sparsity: fraction removed at the end, by modality if a mapping.
            steps: of the optimizer, in the whole training.
            score: `magnitude`, `taylor`, `platon`, or an instance such as `Platon(beta2=0.9)`.
            warmup: number of steps without pruning at the start, and with fixed masks at the end;
                None: a twentieth and a quarter of the steps.
            every: steps from one choice of masks to the next. 10 is the published value.
            schedule: how the sparsity rises between the warm-ups.
            allocation: how many elements each tensor keeps. `id` needs an `id_profile`.
            floor: least fraction that every tensor keeps.
            revive: whether removed weights may come back before the final warm-up.
            factors: by canonical name of every weight what multiplies its importance where tensors
                are compared.
            id_profile: of `measure_id`, or its file: the intrinsic dimensions are the factors.
            adapter: None: the one that claims the model.

        Raises:
            SparsityError: if the numbers do not fit together.
            StatisticsError: if factors or profile are of another model.
            UnsupportedError: if the model is sharded among processes, or offloaded.
        """
        model = bare(model)
        adapter = resolve_adapter(model, adapter)
        weights = WeightMap.of(model, adapter)
        check_resident(model, "training")
        if weights.sharded:
            raise UnsupportedError(
                "gradual pruning remembers whole weights and does not run on a model that "
                "fully_shard has divided; SparsityLock does: prune first, then train under the lock"
            )
        warn_of_dense(model, adapter, weights)
        known = _factors(factors, resolve_profile(id_profile), weights)
        if isinstance(allocation, str):
            allocation = allocation_by_name(allocation)
        if (allocation.score and allocation.score.needs) or not allocation.measured:
            raise UnsupportedError(
                f"allocation {allocation.name!r} reads data, and gradual pruning has only the "
                "weights and gradients of training; give another one, such as global or layer"
            )
        before, after = default_warmup(steps) if warmup is None else warmup
        rise = Rise(
            training_score(score),
            target_of(sparsity),
            Timetable(steps, before, after, every, schedule),
            allocation if known is None else allocation.with_factors(known),
            floor,
            revive,
            known,
        )
        self._model, self._adapter = model, adapter
        self._rising = RisingMasks(weights, rise)
        self._uses = {name: uses_of(model, weight) for name, weight in weights.items()}
        self._dense: str | None = weights.content_hash()
        self._lock: SparsityLock | None = None
        self._handles: list[RemovableHandle] = []
        self._skipped = False

    @property
    def step(self) -> int:
        """How many steps of the optimizer were counted so far."""
        return self._rising.step

    @property
    def finished(self) -> bool:
        """Whether the masks are the last ones, and locked."""
        return self._rising.finished

    @property
    def sparsity(self) -> float:
        """Fraction that the masks remove now."""
        return self._rising.sparsity

    def attach(self, optimizer: Optimizer) -> GradualPruning:
        """Follows the steps of an optimizer from now on.

        Args:
            optimizer: trains the model; that of `accelerate` may be wrapped.

        Returns:
            This, which is a context manager: it lets go when the block ends.

        Raises:
            UnsupportedError: if it follows one already, or the optimizer does not hold a weight
                whose gradient is needed.
        """
        if self._handles:
            raise UnsupportedError("this follows an optimizer already; detach() first")
        optimizer = unwrapped(optimizer)
        score = self._rising.rise.score
        if score.reads_gradients and (outside := held_by_none(self._uses, optimizer)):
            raise UnsupportedError(
                f"{len(outside)} of {len(self._uses)} prunable weights are not in the optimizer "
                f"(first: {outside[0]!r}), and score {score.name!r} would take them for "
                "unimportant; train them too, make this of the model that the optimizer trains "
                "(after it was wrapped), leave them out by the adapter (ModuleAdapter(model, "
                "...)), or use score='magnitude'"
            )
        self._handles = [
            before_updates(optimizer, self._before_update),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self._rising.held:
            self._hold()
        return self

    def detach(self) -> None:
        """Lets go of optimizer and gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._lock is not None:
            self._lock.detach()

    def skip_step(self) -> None:
        """Counts a step that the optimizer did not take.

        `GradScaler` leaves steps out whose gradients are infinite. They are not counted by
        themselves: call this if they count among `steps`. The final warm-up is there for the
        others.
        """
        self._advance()

    def masks(self) -> Masks:
        """The masks as they are now; a warning says so if they are not the last ones."""
        if not self.finished:
            last = self._rising.rise.timetable.last
            logger.warning(
                "these are masks on the way, of step %d, and remove %.4f of the weights; the "
                "target is reached at step %d",
                self.step,
                self.sparsity,
                last,
            )
        return self._rising.masks(weights_hash=self._dense)

    def check(self) -> None:
        """Raises `MaskError` if something that shall be zero by now is not."""
        if self._lock is not None:
            self._lock.check()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides model and optimizer: tensors alone.

        They are those in use, not copies: save them before the next step.
        """
        return dump(self._rising, self._dense)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Resumes where another run stopped, with its model and optimizer.

        Raises:
            MaskError: if the state is of another run, or damaged.
        """
        self._dense = restore(self._rising, state)
        if self._lock is not None and not self._rising.held:  # the state is of an earlier step
            self._lock.detach()
            self._lock = None
        if self._handles and self._rising.held:
            self._hold()

    def __enter__(self) -> GradualPruning:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _before_update(self, optimizer: Optimizer, first: bool) -> None:
        infinite: torch.Tensor | None = getattr(optimizer, "found_inf", None)
        self._skipped = infinite is not None and bool(infinite.sum())
        if self._skipped:
            return
        if first and self._rising.rise.score.reads_gradients and not self.finished:
            self._rising.observe(_gradients_of(self._rising.weights, self._uses, optimizer))
        if self._lock is not None:
            self._lock.mask_gradients()

    def _after_step(self, *_: Any) -> None:
        if not self._skipped:
            self._advance()

    def _advance(self) -> None:
        if self._rising.advance():
            if self._rising.held:
                self._hold()
            else:
                for name, mask in self._rising.keep.items():
                    zero_outside(self._rising.weights[name].parameter, mask)
        elif self._lock is not None:
            self._lock.apply()

    def _hold(self) -> None:
        """Locks the masks as they are."""
        if self._lock is None:
            masks = self._rising.masks(weights_hash=self._dense)
            self._lock = SparsityLock(self._model, masks, self._adapter)
        else:
            self._lock.update(self._rising.keep)
        if self._handles:
            self._lock.watch_gradients()
        self._lock.apply()


def _factors(
    factors: Mapping[str, float] | None, profile: IdProfile | None, weights: WeightMap
) -> Factors | None:
    if profile is None:
        return None if factors is None else Factors.of(factors)
    if factors is not None:
        raise UnsupportedError("give factors or an id_profile, not both")
    return profile.factors(weights, "all")
