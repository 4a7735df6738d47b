"""An adapter for any `nn.Module`: what is used when no other adapter claims the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vlp_plugins.adapter import (
    Adapter,
    Batch,
    Exclusion,
    Negatives,
    Owner,
    Stream,
    WeightSpec,
    need,
)
from vlp_plugins.module_adapter.call import bind_batch, left_out
from vlp_plugins.module_adapter.layers import explain_rest, prunable_layers
from vlp_plugins.module_adapter.tokens import real_tokens, token_space
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import bare
from vlp_plugins.weights import WeightMap

logger = logging.getLogger("vlp_plugins.module_adapter")

Loss = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
"""Takes the model and a batch as the loader made it; returns a scalar, or scalars by name."""

_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class ModuleAdapter(Adapter):
    """Every `Linear` and `Conv2d` weight of a model, named by the path of its module.

    Not pruned: embeddings and what is tied to them (language-model heads), normalisation, biases
    and other vectors, grouped convolutions, `exclude`. Linears that share a weight are one.

    Batches are mappings (`model(**batch)`, values that the forward does not take are left out),
    tuples or lists (`model(*batch)`, cut to the parameters that have no default, so that loaders of
    `(inputs, labels)` work; a mapping gives optional inputs, too) or a tensor (`model(batch)`).

    Which tokens are real: with an `attention_mask` and no `pixel_values`, every layer obeys the
    mask; with both, layers whose path contains vision, visual, image or patch see real tokens only
    and the others obey the mask; without a mask everything is real. Say otherwise with `tokens`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        modalities: Mapping[str, str] | None = None,
        exclude: Sequence[str] | str = (),
        tokens: Mapping[str, str | None] | None = None,
        name: str = "module",
    ) -> None:
        """Describes models of the class of `model`, which is not kept.

        Args:
            model: the model to prune, wrapped (`torch.compile`, `DistributedDataParallel`) or not.
            loss: what gradient methods differentiate.
            modalities: regular expression -> modality. The first that is found in the path of a
                layer counts; `model` where none is.
            exclude: regular expressions; a layer in whose path one is found is not pruned.
            tokens: regular expression -> key of the batch that holds the `[batch, tokens]` mask of
                the layer's input, or None where all tokens are real. The first found counts.
            name: adapter name that masks carry.

        Raises:
            UnsupportedError: if a pattern is no regular expression or is found in no path, or if
                the model has lazy layers that were never run.
        """
        model = bare(model)
        if lazy := [path for path, p in model.named_parameters() if is_lazy(p)]:
            raise UnsupportedError(
                f"{lazy[0]} is lazy and has no shape yet; run the model on one batch first"
            )
        self.name = name
        self._type = type(model)
        self._warned = False
        self._loss = loss
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        self._modalities = _compile(modalities or {}, "modalities", paths)
        self._tokens = _compile(tokens or {}, "tokens", paths)
        exclude = (exclude,) if isinstance(exclude, str) else exclude
        self._exclude = [p for p, _ in _compile(dict.fromkeys(exclude), "exclude", paths)]

    def settings(self) -> dict[str, Any]:
        """`exclude`, `modalities` and `tokens`; no loss, which is code."""
        return {
            "exclude": [pattern.pattern for pattern in self._exclude],
            "modalities": {pattern.pattern: value for pattern, value in self._modalities},
            "tokens": {pattern.pattern: value for pattern, value in self._tokens},
        }

    def claims(self, model: nn.Module) -> bool:
        """True for models of the class it was made for."""
        return type(model) is self._type

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """One weight per layer; those that share a Parameter are merged by `WeightMap.of`."""
        for path in prunable_layers(model, self._exclude):
            modality = _first(self._modalities, path, "model")
            index = _INDEX.search(path)
            depth = int(index[1]) if index else 0
            space = token_space(path, self._tokens)
            yield WeightSpec(path, modality, depth, (Owner(path, space),))

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Explains every parameter that is not pruned, one entry per reason."""
        return explain_rest(model, self._exclude)

    def streams(
        self, model: nn.Module, batch: Batch | Sequence[Any] | Tensor, *, published: bool = False
    ) -> Iterator[Stream]:
        """One stream, `forward`. An input `[B, features]` has no tokens to leave out.

        Raises:
            BatchError: if the batch does not fit the forward, or has text without a mask.
        """
        arguments = bind_batch(model.forward, batch)
        if isinstance(batch, (tuple, list)) and len(batch) > len(arguments.args):
            self._warn(len(arguments.args), left_out(arguments))
        spaces = {owner.tokens for spec in self.weights(model) for owner in spec.owners}
        real = {space: real_tokens(space, batch) for space in sorted(spaces)}
        return iter((Stream("forward", lambda: model(*arguments.args, **arguments.kwargs), real),))

    def _warn(self, given: int, optional: Sequence[str]) -> None:
        """Says once that items of the batches are not taken for optional inputs."""
        if optional and not self._warned:
            self._warned = True
            logger.warning(
                "of every batch %d item%s given to the forward; what follows is taken for labels, "
                "not for its optional %s: give optional inputs by name, in batches that are "
                "mappings",
                given,
                " is" if given == 1 else "s are",
                ", ".join(optional),
            )

    def losses(
        self,
        model: nn.Module,
        batch: Batch | Sequence[Any] | Tensor,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """What `loss` returns: `{"loss": scalar}`, or its dict.

        Raises:
            UnsupportedError: without a `loss`, or if it returns anything but scalars.
        """
        if self._loss is None:
            raise UnsupportedError(
                f"adapter {self.name!r} knows no loss for {type(model).__name__}, which gradient "
                "methods need; give one: ModuleAdapter(model, loss=lambda model, batch: ...)"
            )
        returned = self._loss(model, batch)
        terms = {"loss": returned} if isinstance(returned, Tensor) else returned
        if not isinstance(terms, Mapping) or not terms:
            raise UnsupportedError(
                f"loss returned {type(returned).__name__}; return a scalar tensor or a dict of them"
            )
        for term, value in terms.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UnsupportedError(f"loss returned {what} as {term!r}; return a scalar tensor")
        return dict(terms)

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Every weight stays where it is; `pretraining` is the only task."""
        if task != "pretraining":
            return super().for_task(task, model)
        return {name: weight.aliases for name, weight in WeightMap.of(model, self).items()}

    def image_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, D]` from `model.get_image_features`."""
        need(batch, "pixel_values")
        return _features(model, "get_image_features", batch)

    def text_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, D]` from `model.get_text_features`."""
        need(batch, "input_ids", "attention_mask")
        return _features(model, "get_text_features", batch)


def _features(model: nn.Module, method: str, batch: Batch) -> Tensor:
    if not callable(function := getattr(model, method, None)):
        raise UnsupportedError(
            f"{type(model).__name__} has no {method}, so retrieval cannot be measured with it"
        )
    arguments = bind_batch(function, batch)
    output = function(*arguments.args, **arguments.kwargs)
    # transformers 5 returns an output object, earlier versions and other models a tensor.
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def _compile(
    patterns: Mapping[str, Any], argument: str, paths: Sequence[str]
) -> list[tuple[re.Pattern[str], Any]]:
    compiled = []
    for text, value in patterns.items():
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UnsupportedError(
                f"{argument}: {text!r} is no regular expression: {error}"
            ) from error
        if not any(pattern.search(path) for path in paths):
            some = ", ".join(path for path in paths[-3:] if path)
            raise UnsupportedError(
                f"{argument}: {text!r} is found in no layer's path (paths are like {some})"
            )
        compiled.append((pattern, value))
    return compiled


def _first(patterns: list[tuple[re.Pattern[str], Any]], path: str, default: str) -> str:
    return next((value for pattern, value in patterns if pattern.search(path)), default)
