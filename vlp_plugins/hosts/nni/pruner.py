"""A registered method as a pruner of NNI: NNI says what and how much, the method says which."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import (
    Evaluator,
    LightningEvaluator,
    TorchEvaluator,
    TransformersEvaluator,
)
from torch import nn

from vlp_plugins.hosts.nni.config import Place, read_config
from vlp_plugins.hosts.nni.scoped_masks import PruneRequest, untouched
from vlp_plugins.hosts.nni.wrapper import (
    NniMasks,
    make_floating,
    masks_in,
    share_masks,
    ties_of,
    unwrapped,
    wrappers_for,
    wrappers_in,
)
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.resolve import resolve_adapter
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.request import Variant
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import (
    DataError,
    UnclaimedModelError,
    UnknownNameError,
    UnsupportedError,
    suggest,
)
from vlp_plugins.runtime.model_state import bare, neutral_state
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.sharding import write_kept
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.factors import GUIDED

_log = logging.getLogger(__name__)


def check_trained(evaluator: Evaluator, weights: Sequence[Weight]) -> None:
    """Makes sure that the evaluator's optimizers hold every pruned weight with `requires_grad`.

    NNI remembers the Parameters of an optimizer by their names in the model that the evaluator was
    first given to. Those of another model, or of a model that was wrapped meanwhile, are dropped in
    silence, and such weights are never trained.

    Raises:
        UnsupportedError: naming the first weight that no optimizer holds.
    """
    helpers = getattr(evaluator, "_optimizer_helpers", None)
    if helpers is None:
        helpers = [helper for helper in (getattr(evaluator, "_optimizer_helper", None),) if helper]
    if not helpers:
        return  # DeepSpeed makes its own from all parameters
    held = {name for helper in helpers for name in _names(helper)}
    trained = [weight for weight in weights if weight.parameter.requires_grad]
    missing = [weight for weight in trained if not held.intersection(weight.aliases)]
    if not missing:
        return
    first = missing[0]
    raise UnsupportedError(
        f"{len(missing)} of {len(trained)} pruned weights are in no optimizer of the evaluator, "
        f"first {first.name!r} ({first.aliases[0]}), so that nothing would train them; make the "
        "optimizer of the parameters of the very model that is pruned, before any other compressor "
        "wraps it, and give the evaluator to the inner pruner: "
        "AGPPruner(MultiflowPruner(model, config_list, evaluator=evaluator), ...); for weights "
        "that should stay as they are call requires_grad_(False)"
    )


def _names(helper: Any) -> list[str]:
    """The names that NNI has noted for an optimizer, of all its groups."""
    groups = helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]
    return [name for group in groups for name in group["params"]]


def _adapter_of(
    model: nn.Module, adapter: Adapter | str | None, evaluator: Evaluator | None
) -> Adapter:
    """The adapter of a model; one that none claims gets a `ModuleAdapter` with this loss."""
    if adapter != "module":
        try:
            return resolve_adapter(model, adapter)
        except UnclaimedModelError:
            _log.info("no adapter claims %s; its layers go by their paths", type(model).__name__)
    return ModuleAdapter(model, loss=_loss_of(evaluator))


def _loss_of(evaluator: Evaluator | None) -> Callable[[nn.Module, Any], torch.Tensor] | None:
    """What an evaluator trains with; None if that is in no form that can be called."""
    if isinstance(evaluator, TransformersEvaluator):
        trainer = evaluator.traced_trainer
        return lambda model, batch: _loss(trainer.compute_loss(model, dict(batch)))
    if isinstance(evaluator, TorchEvaluator):
        step = evaluator._ori_training_step
        return lambda model, batch: _loss(step(batch, model))
    if isinstance(evaluator, LightningEvaluator):  # the model is its own training step
        return lambda model, batch: _loss(_lightning_step(model, batch))
    return None


def _lightning_step(model: Any, batch: Any) -> Any:
    """What the `training_step` of a Lightning module returns; its numbers of batches are 0."""
    count = len(inspect.signature(model.training_step).parameters)
    return model.training_step(batch, *[0] * (count - 1))


def _loss(output: Any) -> torch.Tensor:
    """The loss among what a training step returns, by NNI's rules."""
    if isinstance(output, Mapping):
        return output["loss"]
    return output[0] if isinstance(output, (tuple, list)) else output


class VlpPruner(Pruner):
    """Base of the pruners that `pruner_class` makes, one per registered method.

    The masks are those of `vlp_plugins.prune` on the model without wrappers, with its dense weights
    as they are now. They hold for a weight under all its names; ties and optimizers survive.

    Attributes:
        scopes: what `config_list` asks for.
        masks: the last masks, for all prunable weights of the model; None before the first.
    """

    method: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: Mapping[str, ModuleWrapper] | None = None,
        *,
        batches: Iterable[Batch] | None = None,
        adapter: Adapter | str | None = None,
        allocation: Allocation | str | None = None,
        variant: Variant = "default",
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Wraps the model; nothing is pruned before `compress`.

        Args:
            model: any module; it is taken out of `torch.compile` and parallel wrappers, and so are
                the names of its layers.
            config_list: as NNI takes it. `sparse_ratio` is allocated to the weights of one
                `global_group_id`, or of one entry; `allocation="layer"` makes every layer lose the
                same, as NNI's own pruners do.
            evaluator: for schedules, and for other compressors that are fused with this one.
            existed_wrappers: what `from_compressor` hands over.
            batches: calibration batches, for methods that need data; read again for every set of
                masks of a schedule.
            adapter: name or instance; None: the one that claims the model, else `module`: a
                `ModuleAdapter` with the evaluator's loss.
            allocation: see `prune`.
            variant: see `prune`.
            seed: see `prune`.
            **options: other keywords of `prune` and parameters of the method.

        Raises:
            VlpError: if something does not fit; the model is unchanged then.
        """
        model = bare(model)
        check_resident(model, "wrapping by NNI")
        if existed := next(iter(wrappers_in(model)), None):
            raise UnsupportedError(
                f"{existed!r} is wrapped by another compressor; make this pruner of it by "
                f"{type(self).__name__}.from_compressor, or finalize it first"
            )
        self.recipe = PruneRequest(self.method, batches, allocation, variant, seed, options)
        self.recipe.resolved()
        self.adapter = _adapter_of(model, adapter, evaluator)
        self.scopes = read_config(config_list, model, self.adapter)
        self.given_config_list = config_list
        self.masks: Masks | None = None
        self.ties = ties_of(model)
        # Attributes that NNI's schedules set: masks at every `interval_steps`, `total_times` times.
        self.interval_steps = -1
        self.total_times: int | Literal["unlimited"] = 1
        self._remaining_times: int | str = 0
        super().__init__(
            model=model,
            config_list=[config for scope in self.scopes for config in scope.nni_config()],
            evaluator=evaluator,
            existed_wrappers=wrappers_for(model, self._places, existed_wrappers or {}),
        )
        share_masks(self._module_wrappers, self._places)

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: Sequence[Mapping[str, Any]],
        *args: Any,
        evaluator: Evaluator | None = None,
        **options: Any,
    ) -> VlpPruner:
        """A pruner that works together with another compressor on its model.

        That one is unwrapped by this, and wrapped again together with the new one. The evaluator,
        if the compressor has none, may come by position, as with NNI's own pruners; options are
        those of the constructor.
        """
        if args:
            evaluator = args[0]
        return super().from_compressor(compressor, new_config_list, evaluator=evaluator, **options)

    @neutral_state()
    def generate_masks(self) -> NniMasks:
        """Masks of the dense weights as they are now, at the ratios that NNI asks for now.

        They are kept as `masks`, too. New values of kept weights (CHITA) are written at once.
        """
        with unwrapped(self.bound_model):
            weights = WeightMap.of(self.bound_model, self.adapter)
            asked = [(scope, scope.demand(self._target_spaces)) for scope in self.scopes]
            if any(demand.ratio for _, demand in asked):
                self.masks = self.recipe.masks(self.bound_model, self.adapter, asked)
            else:
                self.masks = untouched(weights, self.method, self.recipe.seed)
            for name, values in (self.masks.new_values or {}).items():
                parameter = weights[name].parameter
                write_kept(parameter, self.masks[name].to(parameter.device), values)
        found: NniMasks = {}
        for place in self._places:
            found.setdefault(place.module, {})[place.parameter] = self.masks[place.weight]
        return found

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, NniMasks]:
        """Masks at once, or in the training of the compressors that are fused with this one.

        Returns:
            The model, still wrapped, and all masks; see `finalize` for the plain pruned model.

        Raises:
            UnsupportedError: if there is training to do without a limit, or none.
        """
        others = len(self.fused_compressors) - 1
        if others > 0 and (self.evaluator is None or (max_steps is None and max_epochs is None)):
            raise UnsupportedError(
                f"{type(self).__name__} works together with {others} other compressors, which make "
                "their masks in training: give one of them an evaluator and call "
                "compress(max_steps=...), or finalize each before the next is made"
            )
        return super().compress(max_steps, max_epochs)

    def get_masks(self) -> NniMasks:
        """The masks of all wrappers, in the dtype of the weights; names of one weight share one."""
        return masks_in(self._module_wrappers)

    @property
    def _places(self) -> list[Place]:
        return [place for scope in self.scopes for place in scope.places]

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is not None or max_epochs is not None:
            raise UnsupportedError(
                f"{type(self).__name__} alone does not train: call compress(), or give it to "
                "nni.compression.pruning.AGPPruner or LinearPruner, which do"
            )
        self.update_masks(self.generate_masks())

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        if self.interval_steps < 1 and self.masks is None:
            raise UnsupportedError(
                f"{type(self).__name__} would make no masks in this training; call its compress() "
                "before other compressors are made of it, set interval_steps, or give it to "
                "AGPPruner or LinearPruner"
            )
        if isinstance(self.recipe.batches, Iterator) and self.total_times != 1:
            raise DataError(
                "the batches are an iterator (a generator?), which can be read once, but masks "
                f"are made {self.total_times} times; give a list of batches or a loader"
            )
        with unwrapped(self.bound_model):
            weights = WeightMap.of(self.bound_model, self.adapter)
        chosen = {name for scope in self.scopes for name in scope.weights}
        check_trained(evaluator, [weights[name] for name in weights if name in chosen])
        self._register_trigger(evaluator)

    def _register_trigger(self, evaluator: Evaluator) -> None:
        self._current_step = 0
        self._remaining_times = self.total_times

        def after_step() -> None:
            self._current_step += 1
            if self._current_step != self.interval_steps:
                return
            if getattr(evaluator, "replaying", False):  # a checkpoint has brought the masks
                with unwrapped(self.bound_model):
                    weights = WeightMap.of(self.bound_model, self.adapter)
                    self.masks = untouched(weights, self.method, self.recipe.seed)
            else:
                self.update_masks(self.generate_masks())
            if isinstance(self._remaining_times, int):
                self._remaining_times -= 1
            if self._remaining_times == "unlimited" or self._remaining_times:
                self._current_step = 0

        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[after_step])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        make_floating(self._module_wrappers, self._places)
        if self.interval_steps < 1:  # its masks were made before
            return
        if isinstance(self._remaining_times, int) and self._remaining_times > 0:
            _log.warning(
                "the training ended %d of %s updates of the masks early; train for at least "
                "interval_steps x total_times = %s optimizer steps to reach the sparsity",
                self._remaining_times,
                self.total_times,
                self.interval_steps * int(self.total_times),
            )

    def _set_default_sparse_granularity(self, target_space: Any) -> None:
        """Single elements."""


_MODULE = "vlp_plugins.hosts.nni"
_made: dict[str, type[VlpPruner]] = {}


def pruner_class(method: str) -> type[VlpPruner]:
    """The pruner of a registered method, ours or an outsider's, or `id*NAME`; one class per method.

    Raises:
        UnknownNameError: if it is not registered.
    """
    if method not in _made:
        plain = method.removeprefix(GUIDED)
        names = registry().method_names()
        if plain not in names and ":" not in plain:
            raise UnknownNameError(f"no method is called {plain!r}{suggest(plain, names)}")
        _made[method] = type(
            class_name(method),
            (VlpPruner,),
            {
                "method": method,
                "__module__": _MODULE,
                "__doc__": f"Method `{method}` of vlp_plugins as a pruner; see `VlpPruner`.",
            },
        )
    return _made[method]


def class_names() -> dict[str, str]:
    """Class name -> method, for all registered methods, alone and guided (`id*NAME`)."""
    methods = registry().method_names()
    return {class_name(name): name for name in [*methods, *(GUIDED + m for m in methods)]}


def class_name(method: str) -> str:
    """`chita++` is `ChitaPlusPlusPruner`, `id*multiflow` is `IdMultiflowPruner`."""
    words = re.findall(r"[A-Za-z0-9]+|\+", method)
    return "".join("Plus" if w == "+" else w[:1].upper() + w[1:] for w in words) + "Pruner"
