"""What the pruner has to know about any model of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from vlp_adapters.objectives import IGNORED
from vlp_adapters.transformers.matrices import attended, matrices_of, output_projections
from vlp_adapters.transformers.tokens import VIDEOS, Sequences, kinds_of_text
from vlp_adapters.transformers.towers import DESIGNED, Towers, inner_model, is_pretrained
from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    Exclusion,
    Negatives,
    Owner,
    Stream,
    TokenKind,
    WeightSpec,
    WeightView,
    blocks_with,
    need,
)
from vlp_plugins.models.generic import (
    Rule,
    asked_for,
    bind,
    explain_rest,
    forward_of,
    patterns_of,
    prunable_parameters,
)
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError


class TransformersAdapter(Adapter):
    """Every `PreTrainedModel` of transformers that no adapter of a family claims, also in PEFT.

    Modalities are `vision`, `text`, `projector` (between the two), `fusion` (layers that read both
    outside the language model, Q-Formers) and `audio`. Canonical names are paths in the bare model:
    the same in `LlavaModel`, `LlavaForConditionalGeneration` and a PEFT model of either.

    Which tokens are padding, text or image is read from the masks that the sub-models are called
    with and from the placeholder ids of the configuration, in every call.
    """

    name = "transformers"
    general = True

    def __init__(
        self, *, include: Sequence[str] | str = (), exclude: Sequence[str] | str = ()
    ) -> None:
        """Takes regular expressions that are searched in the paths of layers.

        Args:
            include: layers to prune although they are left out by default.
            exclude: layers not to prune; they go before `include`.

        Raises:
            UnsupportedError: if one is no regular expression.
        """
        self._include = patterns_of("include", include)
        self._exclude = patterns_of("exclude", exclude)

    def settings(self) -> dict[str, Any]:
        """`include` and `exclude`, as far as they are given."""
        given = {"include": self._include, "exclude": self._exclude}
        return {name: [p.pattern for p in found] for name, found in given.items() if found}

    def claims(self, model: nn.Module) -> bool:
        """True for models of transformers, and PEFT models of them."""
        return is_pretrained(inner_model(model)[1])

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """Every matrix of the layers of the towers, and of what joins them.

        Those are the weights of `Linear`, `Conv2d` and `Conv1D` layers, and the matrices that stand
        in one parameter together: of each expert, of query, key and value.
        """
        towers = Towers.of(model)
        uncalled = output_projections(towers.model)
        for path, module, name in prunable_parameters(model, self._rule(towers)):
            own = path.removeprefix(towers.prefix)
            canonical = towers.canonical(path) + ("" if name == "weight" else f".{name}")
            place = (towers.modality(own), towers.depth(own))
            views: dict[str, WeightView | None] = {"": None, **matrices_of(module, name)}
            if len(views) > 1:
                del views[""]
            if module in uncalled:
                path, _, layer = path.rpartition(".")
                name, views = f"{layer}.{name}", {"": attended()}
            for matrix, view in views.items():
                yield WeightSpec(
                    f"{canonical}.{matrix}" if matrix else canonical,
                    *place,
                    (Owner(path, towers.reads(own), name, view),),
                )

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Explains every parameter that is not pruned, one entry per reason."""
        return explain_rest(
            model, self._rule(Towers.of(model)), lambda reason: reason.startswith(DESIGNED)
        )

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """One stream, `forward`, without labels where the model needs none.

        Raises:
            BatchError: if the batch does not fit the forward, or has text without a mask or videos
                that the model does not take.
        """
        towers = Towers.of(model)
        forward = _taken(towers.model, batch)
        if "input_ids" in batch and "attention_mask" in forward:
            need(batch, "attention_mask")
        options: dict[str, Any] = {}
        if not towers.model.config.is_encoder_decoder:
            options["labels"] = None
            if "logits_to_keep" in forward and not self._include:
                options["logits_to_keep"] = 1
        sequences = Sequences(towers, batch)

        def run() -> Any:
            with sequences.observed():
                output = _run(model, {**batch, **options})
                sequences.check_read()
                return output

        return iter((Stream("forward", run, kinds=sequences.kinds, samples=sequences.samples),))

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """The layers that transformers keeps whole on one device, and what is in none of them."""
        owners = [owner.module for spec in self.weights(model) for owner in spec.owners]
        kinds = {
            kind
            for module in model.modules()
            if is_pretrained(module)
            for kind in getattr(module, "_no_split_modules", None) or ()
        }
        return blocks_with(model, owners, lambda module: type(module).__name__ in kinds)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """The model's own loss, `loss`.

        A model that writes text is trained on the text of the batch if there are no `labels`:
        `input_ids`, without padding and the placeholders of images.

        Args:
            model: a model with a loss of its own.
            batch: its inputs, and `labels` as it takes them.
            negatives: ignored.
            published: ignored.

        Raises:
            UnsupportedError: if the model has no loss.
            BatchError: if the batch has no labels.
        """
        inner = inner_model(model)[1]
        forward = _taken(inner, batch)
        inputs = dict(batch)
        if "return_loss" in forward:
            inputs["return_loss"] = True
        elif "labels" in forward and inputs.get("labels") is None:
            if inner.can_generate() and not inner.config.is_encoder_decoder:
                inputs["labels"] = _labels(inner.config, batch)
            elif inner.main_input_name != "pixel_values" or inner.config.is_encoder_decoder:
                need(batch, "labels")
            else:
                inputs.pop("labels", None)
        loss = getattr(_run(model, inputs), "loss", None)
        if loss is None:
            hint = ""
            if "labels" in forward and batch.get("labels") is None:
                hint = " without labels in the batch"
            raise UnsupportedError(
                f"{type(inner).__name__} computes no loss{hint}, which gradient methods need; give "
                "a model with a head, or one with ModuleAdapter(model, loss=...)"
            )
        return {"loss": loss}

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Every weight stays where it is; `pretraining` is the only task."""
        if task != "pretraining":
            return super().for_task(task, model)
        return {name: weight.aliases for name, weight in WeightMap.of(model, self).items()}

    def _rule(self, towers: Towers) -> Rule:
        """Why a parameter is not pruned: asked for, or by default."""
        asked = asked_for(self._exclude)
        uncalled = output_projections(towers.model)

        def kept(module: nn.Module, name: str) -> str | None:
            weight = name == "weight" and module in uncalled
            return "" if weight or matrices_of(module, name) else None

        def rule(path: str, module: nn.Module, name: str) -> str | None:
            if reason := asked(path, module, name):
                return reason
            if any(pattern.search(path) for pattern in self._include):
                return kept(module, name)
            if reason := towers.excluded(path, module, name):
                return reason
            return kept(module, name)

        return rule


def _taken(model: nn.Module, batch: Batch) -> Iterable[str]:
    """What a model takes; `BatchError` if the batch is no mapping, or has videos without use."""
    need(batch)
    forward = inspect.signature(model.forward).parameters.keys()
    for name in batch:
        if batch[name] is not None and VIDEOS.match(name) and name not in forward:
            raise BatchError(
                f"{type(model).__name__} takes no {name}: it reads no videos, or reads their "
                "frames as images; make batches with the processor of this model"
            )
    return forward


def _run(model: nn.Module, inputs: Batch) -> Any:
    """The forward of a model on what it takes of the inputs."""
    return forward_of(model, bind(model.forward, inputs))


def _labels(config: Any, batch: Batch) -> Tensor:
    """The text of a batch, `[B, T]`, and -100 elsewhere."""
    ids, _ = need(batch, "input_ids", "attention_mask")
    kinds: Any = kinds_of_text(config, batch)
    return ids.masked_fill(kinds != TokenKind.TEXT, IGNORED)
