"""Gradients of the pre-training loss, batch by batch; what the loss changes is restored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from operator import itemgetter

import torch
from torch import nn

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap, uses_of
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.runtime.model_state import (
    callers_defaults,
    fast_path_off,
    flags_kept,
    precision,
    random_state_kept,
)
from vlp_plugins.runtime.offload import brought, device_of
from vlp_plugins.runtime.parallel import on_host
from vlp_plugins.runtime.sharding import (
    as_forward,
    at_rest,
    here,
    in_any_process,
    is_sharded,
    whole,
)

logger = logging.getLogger("vlp_plugins.calibration")

LOSS_SCALES = tuple(2.0**power for power in range(16, -9, -4))
"""What a float16 loss is multiplied by before its backward; the next after an overflow.

Powers of two, so that nothing but underflow and overflow changes. Every batch starts at the first:
gradients must not depend on the batches that a process has seen before.
"""


def total(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the terms, scalars of any shape and dtype, in float32."""
    device = next(iter(terms.values())).device
    return torch.stack([term.to(device).float().reshape(()) for term in terms.values()]).sum()


def check_loss(terms: Mapping[str, torch.Tensor], index: int, *, together: bool = False) -> None:
    """Raises `NonFiniteError` for the first term that is NaN or infinite, in all ranks together."""
    values = on_host([term.detach().float() for term in terms.values()])
    bad = ~torch.isfinite(values)
    if together:
        bad = in_any_process(bad.to(next(iter(terms.values())).device))
    for name, value, is_bad in zip(terms, values.tolist(), bad.tolist(), strict=True):
        if is_bad:
            raise NonFiniteError(
                f"the loss {name!r} of batch {index} is {value}; look at that batch and at the "
                "checkpoint (weights after a diverged training), or leave such batches out with "
                "skip_nonfinite (--skip-nonfinite)"
            )


def _first_nonfinite(gradients: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first gradient with NaN or infinity; if sharded, the same in all ranks."""
    if not gradients:
        return None
    if is_sharded(gradients.values()):
        finite = [torch.isfinite(here(gradient)).all() for gradient in gradients.values()]
        bad = in_any_process(~torch.stack(finite)).tolist()
        return next((name for name, is_bad in zip(gradients, bad, strict=True) if is_bad), None)
    # NaN or infinity always shows in the sum, at a fraction of the cost of a test of every
    # element, and one transfer has all sums. An overflow shows too, hence the second test.
    sums = on_host([gradient.sum() for gradient in gradients.values()])
    suspects = (~torch.isfinite(sums)).tolist()
    for (name, gradient), suspect in zip(gradients.items(), suspects, strict=True):
        if suspect and not bool(torch.isfinite(gradient).all()):
            return name
    return None


def _bad(gradient: torch.Tensor) -> int:
    """How many elements are NaN or infinite."""
    return int((~torch.isfinite(whole(gradient))).sum())


@contextmanager
def loss_state_kept(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """`Adapter.loss_state` is as before afterwards."""
    before = copy_of_state(model, adapter)
    try:
        yield
    finally:
        write_state(model, adapter, before)


def copy_of_state(model: nn.Module, adapter: Adapter) -> list[torch.Tensor]:
    """A copy of `Adapter.loss_state`, in its order."""
    return [tensor.detach().clone() for tensor in adapter.loss_state(model)]


def bytes_of_state(model: nn.Module, adapter: Adapter) -> int:
    """Bytes of `Adapter.loss_state`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.loss_state(model))


@torch.no_grad()
def write_state(model: nn.Module, adapter: Adapter, state: Sequence[torch.Tensor]) -> None:
    """Inverse of `copy_of_state`; tensors may come from another device."""
    for tensor, value in zip(adapter.loss_state(model), state, strict=True):
        tensor.copy_(value)


def _sharded_grad(
    loss: torch.Tensor, leaves: Sequence[nn.Parameter], *, retain_graph: bool
) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad` for sharded parameters, in all processes with the same loss."""
    # The graph ends in parameters that `fully_shard` has gathered: only `.grad` receives the
    # gradients of the sharded ones, the mean over the processes, whose batch is the same.
    before = [parameter.grad for parameter in leaves]
    try:
        for parameter in leaves:
            parameter.grad = None  # what is there would be added to
        loss.backward(retain_graph=retain_graph)
        return tuple(parameter.grad for parameter in leaves)
    finally:
        for parameter, gradient in zip(leaves, before, strict=True):
            parameter.grad = gradient


class LossProbe:
    """Runs the adapter's losses forward and backward, and leaves the model as it was.

    Attributes:
        sharded: whether the model is under `fully_shard`; all processes then run every batch.
        skip_nonfinite: whether batches whose loss or gradients are not finite are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        *,
        published: bool = False,
        autocast: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        """Does nothing to the model before `attached`."""
        self._model = model
        self._adapter = adapter
        self._weights = weights
        self._published = published
        self._autocast = autocast
        self.skip_nonfinite = skip_nonfinite
        at_rest(model)
        self.sharded = is_sharded(model.parameters())
        self._device = device_of(model)
        self._uses: dict[str, list[nn.Parameter]] = {}
        self._stateful = False
        self._found: dict[str, torch.Tensor] = {}
        self._brought: list[tuple[str, nn.Parameter]] = []

    @contextmanager
    def attached(
        self, names: Collection[str] | None = None, *, keep_state: bool = False
    ) -> Iterator[LossProbe]:
        """The model in evaluation mode, with gradients for some weights only.

        On leaving, training flags, `requires_grad`, gradients, the random state and the adapter's
        `loss_state` are as they were: every `with` block starts from the same state, so a second
        pass over the same batches gives the same gradients.

        Args:
            names: canonical names of the weights to differentiate by; None: all.
            keep_state: leave `loss_state` as the last batch left it, for a block that continues
                from there; the caller restores it.

        Raises:
            UnsupportedError: if the model was made in inference mode, or if its losses change
                parameters that are sharded or offloaded.
        """
        at_rest(self._model)
        wanted = self._weights if names is None else names
        away = {
            path
            for name, weight in self._weights.items()
            if name in wanted and weight.offloaded
            for path in weight.aliases
        }
        with (
            flags_kept(self._model),
            fast_path_off(),
            brought(self._model, away) as self._brought,
        ):
            self._uses = self._parameters(wanted)
            # By module and name: accelerate makes other objects for every call of an offloaded one.
            requiring = [
                (module, name, parameter.requires_grad)
                for module in self._model.modules()
                for name, parameter in module.named_parameters(recurse=False)
            ]
            state = list(self._adapter.loss_state(self._model))
            if is_sharded(state):  # what `fully_shard` gathers for a forward pass is thrown away
                raise UnsupportedError(
                    "the losses of this model change parameters in place (momentum copies?) that "
                    "fully_shard has sharded; leave these parameters whole: "
                    "fully_shard(model, ignored_params=set(adapter.loss_state(model)))"
                )
            if any(tensor.is_meta for tensor in state):
                raise UnsupportedError(
                    "the losses of this model change parameters in place (momentum copies?) that "
                    "accelerate has offloaded; leave these in the model by its device_map"
                )
            self._stateful = bool(state)
            with nullcontext() if keep_state else loss_state_kept(self._model, self._adapter):
                try:
                    self._model.eval()
                    # Any other parameter would have its gradient computed for nothing.
                    for module, name, _ in requiring:
                        module.get_parameter(name).requires_grad_(False)
                    for parameter in (p for uses in self._uses.values() for p in uses):
                        parameter.requires_grad_(True)
                    yield self
                finally:
                    at_rest(self._model)
                    self._found.clear()
                    self._uses = {}
                    for module, name, flag in requiring:
                        module.get_parameter(name).requires_grad_(flag)

    def measure(self, batch: Batch, index: int) -> dict[str, torch.Tensor] | None:
        """The gradients of one batch; to be called inside `attached`.

        Args:
            batch: as the adapter reads it; it is moved to the model's device.
            index: of the batch, for error messages and to seed losses that draw random numbers.

        Returns:
            By canonical name a gradient of the weight's shape and device, float32, summed over all
            uses, sharded as the weight is (`sharding.whole` gathers it); a weight that the loss
            does not reach is absent. The next call empties the dictionary, so that two sets of
            gradients never exist. None if the batch is skipped.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; names batch and layer.
            BatchError: if the batch lacks what the loss needs.
            UnsupportedError: if the family has no loss.
        """
        self._found.clear()
        try:
            with self._running(index), torch.enable_grad():
                self._found.update(self._gradients(batch, index))
        except NonFiniteError as error:
            if not self.skip_nonfinite:
                raise
            logger.warning("skipped batch %d: %s", index, error)
            return None
        return self._found

    def hand_over(
        self, batch: Batch, index: int, take: Callable[[str, torch.Tensor], None]
    ) -> bool:
        """`measure`, but that each gradient is given away as soon as the backward pass has made it.

        So they do not exist at the same time, unless that is needed: to leave out a batch whose
        gradients are not finite, to scale a float16 loss, and where the model is sharded.

        Args:
            batch: as of `measure`.
            index: as of `measure`.
            take: called with canonical name and gradient, in no certain order, before an error in
                another gradient is found.

        Returns:
            False if the batch is skipped.

        Raises:
            VlpError: see `measure`.
        """
        half = torch.float16 in (
            self._autocast,
            next((p.dtype for uses in self._uses.values() for p in uses), None),
        )
        if not (self.sharded or self.skip_nonfinite or half):
            with self._running(index), torch.enable_grad():
                self._hand_over(batch, index, take)
            return True
        gradients = self.measure(batch, index)
        for name, gradient in (gradients or {}).items():
            take(name, gradient)
        return gradients is not None

    def _hand_over(
        self, batch: Batch, index: int, take: Callable[[str, torch.Tensor], None]
    ) -> None:
        terms = self._losses(batch)
        check_loss(terms, index)
        loss = total(terms)
        uses = self._uses_now()
        of_leaf: dict[nn.Parameter, list[str]] = {}
        for name, parameters in uses.items():
            for parameter in parameters:
                of_leaf.setdefault(parameter, []).append(name)
        if not loss.requires_grad or not of_leaf:
            return
        found: dict[nn.Parameter, torch.Tensor] = {}
        given: set[str] = set()
        bad: dict[str, torch.Tensor] = {}

        def give(name: str) -> None:
            parts = {parameter: found.get(parameter) for parameter in uses[name]}
            for gradient in self._by_weight({name: uses[name]}, parts).values():
                if gradient.device.type != "cpu":  # a look at each would wait for each
                    bad[name] = (~torch.isfinite(gradient)).sum()
                elif _first_nonfinite({name: gradient}) is not None:
                    raise NonFiniteError(self._nonfinite(name, _bad(gradient), index))
                take(name, gradient)
            given.add(name)
            for parameter in uses[name]:
                if all(other in given for other in of_leaf[parameter]):
                    found.pop(parameter, None)

        def arrived(leaf: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
            found[leaf] = gradient
            for name in of_leaf[leaf]:
                if all(parameter in found for parameter in uses[name]):
                    give(name)
            return gradient.new_zeros(()).expand_as(gradient)  # what autograd keeps until the end

        hooks = [leaf.register_hook(partial(arrived, leaf)) for leaf in of_leaf]
        try:
            with torch.autocast(self._device.type, enabled=False):
                torch.autograd.grad(loss, list(of_leaf), allow_unused=True)
                for name in uses:
                    if name not in given and any(parameter in found for parameter in uses[name]):
                        give(name)  # one of its tied parameters was not reached
            for name, count in zip(
                bad, on_host([*bad.values()]).tolist() if bad else (), strict=True
            ):
                if count:
                    raise NonFiniteError(self._nonfinite(name, count, index))
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, batch: Batch, index: int) -> float:
        """The summed losses of one batch, without gradients; NaN or infinite where they are.

        To be called inside `attached`; advances `loss_state` as `measure` does.
        """
        with self._running(index), torch.no_grad():
            terms = self._losses(batch)
            at_rest(self._model)
            return float(total(terms))

    def advance(self, batch: Batch, index: int = 0) -> None:
        """Changes `loss_state`, if any, as `measure` does; to be called inside `attached`."""
        if not self._stateful:
            return
        with self._running(index), torch.no_grad():
            batch = to_device(batch, self._device)
            advance = self._adapter.advance
            as_forward(self._model, lambda: advance(self._model, batch, published=self._published))
            at_rest(self._model)

    @contextmanager
    def _running(self, index: int) -> Iterator[None]:
        """Numbers drawn depend on the batch alone, and the caller's inference mode is left."""
        device = self._device
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(random_state_kept(device))
            torch.default_generator.manual_seed(index)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(index)
            stack.enter_context(callers_defaults(self._model))
            stack.enter_context(precision(device, self._autocast))
            stack.callback(self._brought.clear)
            yield

    def _losses(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        batch = to_device(batch, self._device)
        losses = self._adapter.losses
        return as_forward(
            self._model, lambda: losses(self._model, batch, published=self._published)
        )

    def _gradients(self, batch: Batch, index: int) -> dict[str, torch.Tensor]:
        terms = self._losses(batch)
        check_loss(terms, index, together=self.sharded)
        loss = total(terms)
        uses = self._uses_now()
        leaves = list(dict.fromkeys(p for each in uses.values() for p in each))
        if not loss.requires_grad or not leaves:
            return {}
        half = torch.float16 in (self._autocast, leaves[0].dtype)
        scales = LOSS_SCALES if half else (1.0,)
        grad = partial(torch.autograd.grad, allow_unused=True)
        differentiate = _sharded_grad if self.sharded else grad
        # Backward belongs outside autocast: it takes the dtypes of the forward.
        with torch.autocast(self._device.type, enabled=False):
            for scale in scales:
                scaled = loss * scale if half else loss
                found = differentiate(scaled, leaves, retain_graph=half)
                gradients = self._by_weight(uses, dict(zip(leaves, found, strict=True)))
                bad = _first_nonfinite(gradients)
                if bad is None:
                    break
                if scale == scales[-1]:
                    raise NonFiniteError(self._nonfinite(bad, _bad(gradients[bad]), index))
        if half:
            for gradient in gradients.values():
                gradient.div_(scale)
        return gradients

    def _uses_now(self) -> dict[str, list[nn.Parameter]]:
        """By canonical name the leaves of the graph that are the weight."""
        if not self._brought:
            return self._uses
        made: dict[str, list[tuple[int, nn.Parameter]]] = {}
        for order, (path, parameter) in enumerate(self._brought):
            made.setdefault(path, []).append((-order, parameter))
        found = {}
        for name, uses in self._uses.items():
            # The last call first, which is how autograd adds the uses of one parameter up.
            called = sorted(
                (each for path in self._weights[name].aliases for each in made.get(path, ())),
                key=itemgetter(0),
            )
            resident = [parameter for parameter in uses if not parameter.is_meta]
            found[name] = list(dict.fromkeys([*resident, *(p for _, p in called)]))
        return found

    def _by_weight(
        self,
        uses: Mapping[str, Sequence[nn.Parameter]],
        found: Mapping[nn.Parameter, torch.Tensor | None],
    ) -> dict[str, torch.Tensor]:
        """Adds up the gradients of the `Parameter`s that are one weight."""
        gradients: dict[str, torch.Tensor] = {}
        for name, parameters in uses.items():
            weight = self._weights[name]
            for whole_gradient in (found[parameter] for parameter in parameters):
                if whole_gradient is None:
                    continue
                part = weight.view_of(whole_gradient)
                if not weight.offloaded:
                    part = part.float()
                known = gradients.get(name)
                gradients[name] = part if known is None else known + part
        return {name: gradient.float() for name, gradient in gradients.items()}

    def _parameters(self, names: Collection[str]) -> dict[str, list[nn.Parameter]]:
        """By canonical name every `Parameter` that is the weight: a tie may be several."""
        found = {}
        for name in self._weights:
            if name not in names:
                continue
            uses = uses_of(self._model, self._weights[name])
            if any(parameter.is_inference() for parameter in uses):
                raise UnsupportedError(
                    f"weight {name!r} was made in inference mode, in which nothing has gradients; "
                    "load the model outside torch.inference_mode()"
                )
            found[name] = uses
        return found

    def _nonfinite(self, name: str, bad: int, index: int) -> str:
        return (
            f"the gradient of weight {name!r} ({self._weights[name].aliases[0]}) has {bad} NaN or "
            f"infinite elements in batch {index}, though its loss is finite; look at that batch, "
            "run in float32 or bfloat16, or leave such batches out with skip_nonfinite "
            "(--skip-nonfinite)"
        )
