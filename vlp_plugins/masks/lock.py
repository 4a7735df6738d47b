"""Keeps zeros zero in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch
from torch import distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vlp_plugins.masks.apply import Violation, check_mask, fit
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight, uses_of
from vlp_plugins.runtime.errors import MaskError, UnsupportedError
from vlp_plugins.runtime.model_state import bare, before_updates, unwrapped
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.sharding import here, is_sharded, part_of

_log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class SparsityLock(AbstractContextManager["SparsityLock"]):
    """Masks that hold while a model is trained: what they remove is exactly zero after every step.

    Example:
        lock = vlp.SparsityLock(model, masks).attach(optimizer)

    Weights are zeroed after each step of the optimizer, so that neither momentum nor weight decay
    nor anything else that an optimizer does moves them. Gradients are zeroed as soon as they are
    there, so that removed weights count neither in the norm that gradients are clipped by nor in
    the optimizer's averages; gradient accumulation, `GradScaler` and closures change nothing about
    that.

    A weight exists once, under however many names. One byte per element is kept on the device of
    the weight (under `fully_shard` for the part that the process holds), none for a weight of which
    nothing is removed. A step costs one pass over gradients and one over weights.

    Make the lock when the model is on its device and wrapped for training: after `.to(...)`, after
    `fully_shard`, after `accelerator.prepare`. A model wrapped by `DistributedDataParallel` or
    `torch.compile` is taken as what is in the wrapper.
    """

    def __init__(self, model: nn.Module, masks: Masks, adapter: Adapter | None = None) -> None:
        """Takes the masks; nothing is done to the model before `apply` or `attach`.

        Args:
            model: of the structure the masks were made for, or a downstream model of the family;
                wrapped or not.
            masks: whose removed elements stay zero; new values in them are not written:
                `masks.apply(model)` does that.
            adapter: see `Masks.apply`.

        Raises:
            MaskError: if the masks do not fit the model.
            UnclaimedModelError: without an adapter, if none claims the model.
        """
        self._model = bare(model)
        self._weights, _ = fit(masks, self._model, adapter)
        check_resident(self._model, "training")
        self._uses = {name: uses_of(self._model, weight) for name, weight in self._weights.items()}
        self._removed: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._hooked = False
        self.update(masks)

    def update(self, masks: Masks | Mapping[str, torch.Tensor]) -> None:
        """Other masks from now on; what they keep and the old ones removed may train again.

        Args:
            masks: as at first, or by canonical name of every weight a bool tensor, True = kept.

        Raises:
            MaskError: if they do not fit the model; the masks stay as they were then.
        """
        names = {name: name for name in self._weights}
        if isinstance(masks, Masks):
            names = masks.match(self._weights)
        removed = {}
        for name, weight in self._weights.items():
            keep = _fitting(masks, names[name], weight)
            if not bool(keep.all()):
                removed[name] = ~part_of(keep, weight.parameter)
        self._removed = removed

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes what the masks remove, in place."""
        for name, removed in self._removed.items():
            here(self._weights[name].parameter).masked_fill_(removed, 0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the gradients of what the masks remove, where there are gradients."""
        for name in self._removed:
            for parameter in self._uses[name]:
                self._mask_gradient(name, parameter)

    def attach(self, *optimizers: Optimizer) -> SparsityLock:
        """Applies the masks now, and at every step of the optimizers from now on.

        A locked weight that no optimizer holds stays zero by itself, as no step moves it; a warning
        names one that requires gradients, which may be a mistake.

        Args:
            optimizers: any that train the model; those of `accelerate` may be wrapped.

        Returns:
            The lock, which is a context manager: it is detached when the block ends.

        Raises:
            UnsupportedError: if the optimizers hold none of the locked weights.
        """
        self._check_held(optimizers)
        self.watch_gradients()
        for optimizer in map(unwrapped, optimizers):
            self._handles += [
                before_updates(optimizer, lambda *_: self.mask_gradients()),
                optimizer.register_step_post_hook(lambda *_: self.apply()),
            ]
        self.apply()
        return self

    def watch_gradients(self) -> None:
        """Zeroes the gradients of removed elements from now on whenever they are accumulated."""
        if self._hooked:
            return
        self._hooked = True
        for name, uses in self._uses.items():
            for parameter in uses:
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(
                        lambda parameter, name=name: self._mask_gradient(name, parameter)
                    )
                    self._handles.append(handle)

    def detach(self) -> None:
        """Removes all hooks from optimizers and parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked = False

    def violations(self) -> list[Violation]:
        """The weights that are not zero where masks remove; a collective if they are sharded.

        Raises:
            MaskError: if the model has other Parameters by now than those that the lock holds.
        """
        found = []
        for name, weight in self._weights.items():
            self._check_same(name, weight)
            removed = self._removed.get(name)
            if removed is None:
                continue
            there = here(weight.parameter).detach()
            counts = torch.stack([(there.ne(0) & removed).sum(), removed.sum()])
            if is_sharded((weight.parameter,)):
                distributed.all_reduce(counts)
            revived, size = counts.tolist()
            if revived:
                found.append(Violation(name, weight.aliases[0], revived, size))
        return found

    def check(self) -> None:
        """Raises `MaskError` naming the first weight that is not zero where the masks remove."""
        if found := self.violations():
            first = found[0]
            raise MaskError(
                f"{len(found)} locked weights are not zero where they should be, first "
                f"{first.weight!r} ({first.path}): {first.revived} of {first.removed} removed "
                "elements; something writes to them after the optimizer's step, or the lock is not "
                "attached to the optimizer that trains them"
            )

    def save_checked(
        self,
        save: Callable[Arguments, Result],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Saves only what is as sparse as it should be: `check`, then `save(*args, **options)`.

            lock.save_checked(model.save_pretrained, "tuned")

        Of a sharded model every process must call it.

        Raises:
            MaskError: see `check`; nothing is saved then.
        """
        self.check()
        return save(*args, **options)

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _check_same(self, name: str, weight: Weight) -> None:
        held = set(map(id, self._uses[name]))
        for path in weight.aliases:
            if id(self._model.get_parameter(path)) not in held:
                raise MaskError(
                    f"{path} is another Parameter than when the lock was made, so its zeros were "
                    "not kept; make the lock after the model is moved, wrapped or given new weights"
                )

    def _mask_gradient(self, name: str, parameter: nn.Parameter) -> None:
        removed = self._removed.get(name)
        if removed is not None and parameter.grad is not None:
            self._weights[name].view_of(here(parameter.grad)).masked_fill_(removed, 0)

    def _check_held(self, optimizers: tuple[Optimizer, ...]) -> None:
        outside = held_by_none(self._uses, *optimizers)
        if len(outside) == len(self._uses):
            raise UnsupportedError(
                f"the optimizer holds none of the {len(self._uses)} locked weights; make the lock "
                "of the model that it trains, after the model was moved or wrapped"
            )
        training = [n for n in outside if any(p.requires_grad for p in self._uses[n])]
        if training:
            _log.warning(
                "%d locked weights require gradients, but the optimizer does not hold them (first: "
                "%r); attach to every optimizer that trains them",
                len(training),
                training[0],
            )


def held_by_none(uses: Mapping[str, Sequence[nn.Parameter]], *optimizers: Optimizer) -> list[str]:
    """The names of the weights of which no optimizer trains any parameter."""
    groups = (group for each in optimizers for group in each.param_groups)
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return [name for name, parameters in uses.items() if not held & set(map(id, parameters))]


def _fitting(masks: Mapping[str, torch.Tensor], name: str, weight: Weight) -> torch.Tensor:
    """The mask of a weight, if there is one that fits."""
    if name not in masks:
        raise MaskError(f"there is no mask for {weight.name!r}; give one for every weight")
    keep = masks[name]
    check_mask(name, keep, weight.shape)
    return keep
