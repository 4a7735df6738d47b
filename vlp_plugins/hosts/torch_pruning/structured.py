"""Cuts heads and units out of a model by Torch-Pruning, in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from vlp_plugins.calibration.batches import named_batches
from vlp_plugins.hosts.torch_pruning.importance import Importance
from vlp_plugins.hosts.torch_pruning.options import shared_modules
from vlp_plugins.hosts.torch_pruning.plan import Cut, Plan, Ratio, ScopeName, plan_of
from vlp_plugins.hosts.torch_pruning.pruner import BlockPruner, Score
from vlp_plugins.hosts.torch_pruning.recorder import record_of
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.reconstruction.layer import Solver
from vlp_plugins.methods.resolve import resolve_adapter
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import checked_arguments
from vlp_plugins.runtime.errors import BatchError, UnsupportedError
from vlp_plugins.runtime.model_state import callers_defaults, flags_kept, neutral_state, takes_model
from vlp_plugins.runtime.numbers import count, percent
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.sharding import is_sharded
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.structured.check import check_equal, example_batch, outputs, relative_error
from vlp_plugins.structured.cuts import masked, patch, prepare, shrink_followers
from vlp_plugins.structured.files import save_structured
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class StructuredResult:
    """A model that was cut in place, and how.

    Attributes:
        record: what is kept of every block that lost something, in coordinates of the dense model.
        history: Torch-Pruning's own, `[path of a layer, outputs or inputs, indices]`.
        parameters_before: number of parameters, each counted once.
        removed: by (modality, `heads`, `dims` or `ffn`) how many went, of how many.
        error: largest difference that the self-check found, relative to the largest value of its
            stream; None without a check.
        made_by: what was asked for, as JSON can keep it.
    """

    model: nn.Module
    adapter: Adapter
    record: Record
    history: list[list[Any]]
    parameters_before: int
    parameters_after: int
    removed: Mapping[tuple[str, str], tuple[int, int]]
    error: float | None
    made_by: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{modality} {cut} {percent(gone / total if total else 0)}"
            for (modality, cut), (gone, total) in self.removed.items()
        )
        before, after = self.parameters_before, self.parameters_after
        return (
            f"StructuredResult(removed: {parts or 'nothing'}; parameters {count(before)} -> "
            f"{count(after)}, {percent(1 - after / before)} fewer)"
        )

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        source: str | None = None,
        earlier: Record | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes a folder that `vlp_plugins.load` and `rebuild` read.

        Args:
            folder: a new one, or an earlier one of this method.
            source: where the model came from, whose tokenizer and processor files are copied; None:
                where it was loaded from, as far as the model says.
            earlier: what was cut before this, such as `read_record` of the folder that the model
                was rebuilt from.
            overwrite: replace a folder that this method wrote; no other is ever replaced.

        Raises:
            VlpError: see `vlp_plugins.structured.save_structured`.
        """
        save_structured(
            self.model,
            folder,
            self.record if earlier is None else earlier.compose(self.record),
            adapter=self.adapter,
            source=source,
            history={"made_by": self.made_by, "torch_pruning": self.history},
            overwrite=overwrite,
        )


def parameters_of(model: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def removed_by(plan: Plan, record: Record) -> dict[tuple[str, str], tuple[int, int]]:
    """By modality and what was cut, how many went, of how many."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for scope in plan.scopes:
        left = sum(scope.left(block, record.get(block.name, Kept())) for block in scope.blocks)
        total = sum(scope.sizes)
        found[scope.modality, scope.cut] = (total - left, total)
    return found


def made_by(importance: object, plan: Plan) -> dict[str, Any]:
    """What was asked for, as JSON can keep it."""
    name = importance if isinstance(importance, str) else getattr(importance, "name", None)
    return {
        "importance": name or type(importance).__name__,
        "ratio": {f"{scope.modality} {scope.cut}": scope.ratio for scope in plan.scopes},
        "scope": plan.scope,
        "steps": plan.steps,
        "round_to": plan.round_to,
    }


@contextmanager
def frozen_stay_frozen(model: nn.Module) -> Iterator[None]:
    """What replaces a frozen Parameter inside the block is frozen, too.

    Torch-Pruning makes a new Parameter of what it leaves of one, with `requires_grad`.
    """
    frozen = [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]
    try:
        yield
    finally:
        for module, name in frozen:
            parameter = module._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(False)


_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers in half precision are float32 inside the block.

    Afterwards those that are as they were have their own values again, and those that were cut or
    rescaled are rounded once.
    """
    places = [
        (held, name, tensor.dtype)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.dtype in _HALF
    ]
    halves = {id(held[name]): held[name] for held, name, _ in places}
    before = [
        (tensor, tensor.data, tensor.grad) for tensor in halves.values() if tensor is not None
    ]
    made = []
    try:
        for tensor, data, _ in before:
            _cast(tensor, torch.float32)
            made.append((tensor, tensor.data, data))
        yield
    finally:
        for tensor, single, half in made:
            if tensor.data_ptr() == single.data_ptr() and tensor.shape == single.shape:
                tensor.grad, tensor.data = None, half
        for tensor, data, gradient in before:
            if tensor.data_ptr() == data.data_ptr():
                tensor.grad = gradient
        for held, name, dtype in places:
            now = held[name]
            if now is not None and now.dtype == torch.float32:
                _cast(now, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> None:
    gradient, tensor.grad = tensor.grad, None  # a gradient has the dtype of its tensor
    tensor.data = tensor.data.to(dtype)
    tensor.grad = None if gradient is None else gradient.to(dtype)


def float32_of(batch: Batch) -> Batch:
    """The batch, its tensors in half precision in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
        for name, value in batch.items()
    }


_KINDS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Snapshot:
    """What the modules of a model hold: cutting makes new tensors, so references will do.

    With `copy` all values are copied, too: training between two cuts changes them.
    """

    def __init__(self, model: nn.Module, *, copy: bool) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = [
            (module, _state_of(vars(module))) for module in model.modules()
        ]
        # transformers installs hooks in the first forward pass, and notes that in an attribute.
        self._hooks = [
            (hooks, dict(hooks))
            for module in model.modules()
            for name, hooks in vars(module).items()
            if name in _HOOKS
        ]
        self._tensors = [
            (p, p.data.clone() if copy else p.data, p.grad) for p in model.parameters()
        ]
        self._buffers = [(b, b.clone()) for b in model.buffers()] if copy else []

    def restore(self) -> None:
        """Puts every module, attribute and tensor in its place again."""
        for module, state in self._modules:
            for name in set(vars(module)) - set(state):
                del vars(module)[name]
            vars(module).update(_state_of(state))
        for hooks, before in self._hooks:
            hooks.clear()
            hooks.update(before)
        for parameter, data, gradient in self._tensors:
            parameter.data, parameter.grad = data, gradient
        for buffer, values in self._buffers:
            buffer.copy_(values)


def _state_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if name in _KINDS else value for name, value in state.items()}


@checked_arguments
@neutral_state()
@takes_model
def prune_structured(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    importance: str | Scorer | Solver | Method | Score = "multiflow",
    ratio: Ratio = 0.5,
    cut: Sequence[Cut] | Cut = ("heads", "ffn"),
    scope: ScopeName = "layer",
    steps: int = 1,
    round_to: int | None = None,
    adapter: Adapter | str | None = None,
    example: Batch | None = None,
    check: bool = True,
    tolerance: float = 1e-5,
    after_step: Callable[[int], None] | None = None,
    **parameters: Any,
) -> StructuredResult:
    """Cuts heads and feed-forward units out of a model, in place.

    Fused projections are split first; layers that share weights are cut with one set of indices and
    still share them; networks that follow others (momentum twins) are cut alike; number and size of
    heads are set. Then the model must give out what the dense one gives out with the same rows and
    columns at zero. If anything fails, the model is as it was.

    Example:
        result = prune_structured(model, batches, ratio={"vision": 0.25, "text": 0.5})
        result.save("smaller")

    Args:
        model: any transformer in whose class transformers' names of layers are found; on one
            device, not sharded.
        batches: for importances that need data.
        importance: name of a registered method (also `id*NAME`), a method or scorer itself, an
            `Importance`, an importance of Torch-Pruning, or any function of its groups. Those that
            read gradients need a backward pass before.
        ratio: fraction removed in [0, 1): of all, by modality, or by modality and kind
            (`{("vision", "ffn"): 0.5}`); what a mapping does not name stays whole.
        cut: what goes: of attention whole `heads` or the same number of `dims` of every head; units
            of `ffn`.
        scope: `layer`: every block loses `int(ratio * size)`. `block kind`: the blocks of one
            modality and kind are ranked together and lose `int(ratio * sizes)`, each keeping
            something.
        steps: in how many steps; importance is asked again at each.
        round_to: dimensions of a head and units are left in multiples of it, rather more than
            fewer; whole heads are counted exactly.
        adapter: see `vlp_plugins.prune`.
        example: a batch to trace and to check with; None makes one up from the model's
            configuration, or takes the first of `batches` if the model does not take that.
        check: whether to compare with the dense model after each step.
        tolerance: of that; relative to the largest value of each stream. Models in half precision
            are compared in float32.
        after_step: called with the number of each step after it, to fine-tune in between. All
            cut Parameters are new or have new sizes: make new optimizers.
        **parameters: of `Importance`, if one is made.

    Returns:
        The record of what was cut, with counts; it can save the model.

    Raises:
        StructureError: if the model cannot be cut, or computes something else afterwards.
        UnsupportedError: for what the model or method cannot do, or a sharded or offloaded
            model.
        SparsityError: for a ratio that cannot be met.
        VlpError: see `vlp_plugins.prune`.
    """
    check_resident(model, "cutting")
    if is_sharded(model.parameters()):
        raise UnsupportedError("the model is sharded; cut it before fully_shard wraps it")
    adapter = resolve_adapter(model, adapter)
    before = parameters_of(model)
    snapshot = Snapshot(model, copy=after_step is not None)
    record, errors = Record(), list[float]()
    try:
        prepare(model, adapter)
        blocks = blocks_of(model, adapter)
        plan = plan_of(blocks, ratio, cut=cut, scope=scope, steps=steps, round_to=round_to)
        score = _importance(importance, model, batches, adapter, parameters)
        if example is None:
            example = _example(model, adapter, batches)
        with flags_kept(model) as restore_flags, shared_modules(model):
            pruner = BlockPruner(model, adapter, plan, score, example)
            compared = float32_of(example) if check else None
            for step in range(1, steps + 1):
                with in_float32(model):
                    now, found = _one_step(pruner, adapter, compared, tolerance)
                record = record.compose(now)
                errors += found
                if after_step is not None:
                    restore_flags()
                    with callers_defaults(model):
                        after_step(step)
    except BaseException:
        snapshot.restore()
        raise
    result = StructuredResult(
        model, adapter, record, pruner.pruning_history(), before, parameters_of(model),
        removed_by(pruner.plan, record), max(errors, default=None),
        made_by(importance, pruner.plan),
    )  # fmt: skip
    _log.info(
        "cut %d blocks: %d of %d parameters are left", len(record), result.parameters_after, before
    )
    return result


def _example(model: nn.Module, adapter: Adapter, batches: Iterable[Batch] | None) -> Batch:
    """A batch that is made up; where the model does not take it (chat models), the first given."""
    made = example_batch(model, adapter)
    try:
        outputs(model, adapter, made)
    except BatchError as error:
        if batches is None or isinstance(batches, Iterator):
            raise BatchError(
                f"no batch for {type(model).__name__} can be made up ({error}); give one of your "
                "own: example=batch"
            ) from error
        return next(iter(named_batches(batches, adapter)))
    return made


def _importance(
    importance: str | Scorer | Solver | Method | Score,
    model: nn.Module,
    batches: Iterable[Batch] | None,
    adapter: Adapter,
    parameters: dict[str, Any],
) -> Score:
    if isinstance(importance, str | Scorer | Solver | Method):
        return Importance(importance, model, batches, adapter=adapter, **parameters)
    if not callable(importance):
        raise UnsupportedError(
            f"{importance!r} is not an importance; give the name of a method, or one of "
            "Torch-Pruning"
        )
    if parameters:
        raise UnsupportedError(
            f"{', '.join(parameters)}: parameters go to the importance itself, not next to it"
        )
    return importance


def _one_step(
    pruner: BlockPruner, adapter: Adapter, example: Batch | None, tolerance: float
) -> tuple[Record, list[float]]:
    """What one step cut, in coordinates of the model before it, and the error of each stream."""
    model = pruner.model
    blocks = blocks_of(model, adapter)
    groups: list[Group] = list(pruner.step(interactive=True))
    record = record_of(groups, model, blocks)
    expected = {}
    if example is not None:
        with masked(model, adapter, record):
            expected = outputs(model, adapter, example)
    with frozen_stay_frozen(model):
        for group in groups:
            group.prune()
    shrink_followers(model, blocks, record)
    patch(model, adapter, record.heads())
    if example is None:
        return record, []
    found = outputs(model, adapter, example)
    check_equal(expected, found, tolerance)
    return record, [relative_error(expected[name], found[name]) for name in expected]
