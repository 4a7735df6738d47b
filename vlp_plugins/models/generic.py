"""An adapter for any `nn.Module`: what is used when no other adapter claims the model."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    Exclusion,
    Negatives,
    Owner,
    Stream,
    TokenKind,
    WeightSpec,
    need,
)
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError
from vlp_plugins.runtime.model_state import bare, check_module
from vlp_plugins.runtime.sharding import is_sharded

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _left_out(arguments: inspect.BoundArguments) -> list[str]:
    """The names of the parameters that could have been given by position, but were not."""
    parameters = arguments.signature.parameters.values()
    taking = (*_BY_POSITION, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.kind in taking and p.name not in arguments.arguments]


def bind(
    forward: Callable[..., object], batch: Mapping[str, Any] | Sequence[Any] | Tensor
) -> inspect.BoundArguments:
    """The arguments of a bound method or function, from a batch as `ModuleAdapter` describes it.

    A mapping gives all its items where `forward` states no name and takes `**kwargs`. A tuple or
    list gives one item to a forward without required parameters, all if it takes `*args` alone. The
    forward of a PEFT model takes anything: what it requires, its base model says.
    """
    base = getattr(getattr(forward, "__self__", None), "get_base_model", None)
    signature = inspect.signature(forward if base is None else base().forward)
    parameters = signature.parameters.values()
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        has = ", ".join(map(str, batch))
        stated = [p.name for p in parameters if p.kind in _BY_NAME]
        if not stated and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            stated = list(batch)
        kwargs = {name: batch[name] for name in stated if batch.get(name) is not None}
        if not kwargs:
            raise BatchError(f"batch has {has}; the forward takes {', '.join(stated)}")
    elif isinstance(batch, Tensor):
        has = "one tensor"
        args = (batch,)
    elif isinstance(batch, (tuple, list)):
        has = f"{len(batch)} items"
        by_position = [p for p in parameters if p.kind in _BY_POSITION]
        required = sum(p.default is inspect.Parameter.empty for p in by_position)
        any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        args = tuple(batch)
        if by_position or not any_number:
            args = args[: required or len(by_position[:1])]
    else:
        raise BatchError(
            f"batch is a {type(batch).__name__}; make it a mapping, a tuple or a tensor"
        )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BatchError(f"batch ({has}) does not fit the forward: {error}") from error


def forward_of(model: nn.Module, arguments: inspect.BoundArguments) -> Any:
    """The forward of a model on what `bind` found; `BatchError` if it does not take that."""
    try:
        return model(*arguments.args, **arguments.kwargs)
    except (TypeError, ValueError) as error:
        raise BatchError(
            f"the forward of {type(model).__name__} does not take such a batch "
            f"({', '.join(arguments.arguments)}): {type(error).__name__}: {error}"
        ) from error


_TIED = "tied to an embedding or to an excluded layer"
_EMBEDDING, _BIAS, _VECTOR = "embedding", "bias", "normalisation, scale or other vector"
_ASKED = "excluded on request"
_ADDED = "added by PEFT to the layer that is pruned"
_BY_DESIGN = (_TIED, _EMBEDDING, _BIAS, _VECTOR, _ASKED, _ADDED)
"""What reasons begin with that are no lack of ours."""

Rule = Callable[[str, nn.Module, str], str | None]
"""Takes path and module of a layer, and the name of a parameter of it; returns why that is not
pruned, None if it may be, and "" if it is pruned in any kind of layer."""


def prunable_parameters(model: nn.Module, rule: Rule) -> list[tuple[str, nn.Module, str]]:
    """What can be pruned: path and module, of one with two paths the first, and parameter.

    The rule leaves layers out in addition to those that cannot be pruned.

    Raises:
        UnsupportedError: if the model is a single layer.
    """
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        raise UnsupportedError(
            f"the model is one {type(model).__name__} layer, which has no path to name its weight "
            "by; wrap it: nn.Sequential(model)"
        )
    reasons = dict(_reasons(model, rule))
    return [
        (path, module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if reasons[f"{path}.{name}" if path else name] is None
    ]


def explain_rest(
    model: nn.Module, rule: Rule, by_design: Callable[[str], bool] = lambda _: False
) -> list[Exclusion]:
    """One `Exclusion` per reason for what `prunable_parameters` leaves out.

    `by_design` says whether a reason of the rule is no lack of ours; see `Exclusion`.
    """
    # Layer numbers become "any number" where all layers agree, so that patterns stay short.
    reasons = dict(_reasons(model, rule))
    by_shape: dict[str, set[str | None]] = {}
    for path, reason in reasons.items():
        by_shape.setdefault(_any_number(path), set()).add(reason)
    patterns: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        if reason is not None:
            agreed = len(by_shape[_any_number(path)]) == 1
            patterns.setdefault(reason, []).append(_any_number(path) if agreed else re.escape(path))
    return [
        Exclusion(
            f"^(?:{'|'.join(dict.fromkeys(found))})$",
            reason,
            reason.startswith(_BY_DESIGN) or by_design(reason),
        )
        for reason, found in patterns.items()
    ]


def asked_for(exclude: Sequence[re.Pattern[str]]) -> Rule:
    """The rule that leaves out the layers in whose path one of the patterns is found."""

    def rule(path: str, _: nn.Module, __: str) -> str | None:
        found = next((p.pattern for p in exclude if p.search(path)), None)
        return None if found is None else f"{_ASKED} ({found})"

    return rule


def _any_number(path: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(path))


def _reasons(model: nn.Module, rule: Rule) -> Iterator[tuple[str, str | None]]:
    """(parameter path, why it is not pruned or None) for every name of every parameter."""
    parameters = [
        (path, module, name, parameter, rule(path, module, name))
        for path, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False)
    ]
    fixed = [
        parameter
        for _, module, _, parameter, own in parameters
        if own or isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    ]
    # Layers of PEFT hold the layer of the model, and their own next to it (`lora_A`, `lora_B`).
    added = tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "get_base_layer")
        for name in getattr(module, "adapter_layer_names", ())
    )
    for path, module, name, parameter, own in parameters:
        reason = None if own == "" else own or _reason(module, name, parameter)
        if f"{path}.{name}.".startswith(added):
            reason = _ADDED
        if reason is None and any(_same(parameter, other) for other in fixed):
            reason = _TIED
        yield (f"{path}.{name}" if path else name), reason


def _reason(module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    """Why parameter `name` of `module` is not pruned, as far as the module shows."""
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _EMBEDDING
    if name.endswith("bias"):
        return _BIAS
    if parameter.ndim < 2:
        return _VECTOR
    if name != "weight" or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return f"{kind}.{name} is not the weight of a Linear or Conv2d layer"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads it without calling its layer: its input is not seen"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return "grouped convolution"
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return "quantised weight"
    return None


def _same(first: Tensor, second: Tensor) -> bool:
    """True if the tensors start at the same memory, or are one object."""
    if first is second:
        return True
    if is_sharded((first, second)):
        return False
    known = first.device.type != "meta" and first.device == second.device and first.numel() > 0
    return known and first.data_ptr() == second.data_ptr()


_IMAGE_PATH = re.compile(r"vision|visual|image|patch", re.IGNORECASE)

# Token spaces. A space that the user named is `mask:` and the batch key of its mask, or `parts:`
# and a list of them.
_TEXT, _VISION, _ALL, _MASK, _PARTS = "text", "vision", "all", "mask:", "parts:"

TokenMasks = str | Sequence[str | None] | None
"""Key of the mask of a sequence in the batch, None where all tokens are real, or a list of these
for the parts of a joint sequence."""


def token_space(path: str, masks: Sequence[tuple[re.Pattern[str], TokenMasks]]) -> str:
    """Token space of the input of the layer at `path`.

    Args:
        path: of the layer.
        masks: pattern and `TokenMasks`. The first pattern found in `path` counts.
    """
    for pattern, key in masks:
        if pattern.search(path):
            if key is not None and not isinstance(key, str):
                return f"{_PARTS}{json.dumps(list(key))}"
            return _ALL if key is None else f"{_MASK}{key}"
    return _VISION if _IMAGE_PATH.search(path) else _TEXT


def real_tokens(space: str, batch: Batch | Sequence[Any] | Tensor) -> Tensor | None:
    """`[batch, tokens]` bool, true where a token of `space` is real; None where all are.

    Raises:
        BatchError: if the batch has no mask where one is needed, or one of a wrong rank.
    """
    key = _mask_key(space, batch)
    return None if key is None else _mask_of(key, batch)


def _mask_of(key: str, batch: Batch | Sequence[Any] | Tensor) -> Tensor:
    """`[batch, tokens]` bool of the mask of that key."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"tokens names the batch key {key!r}, but batches are {type(batch).__name__}s; "
            "make the loader return mappings"
        )
    (mask,) = need(batch, key)
    if mask.ndim != 2:
        raise BatchError(f"{key} should be [batch, tokens] but has shape {list(mask.shape)}")
    return mask != 0


class JointTokens:
    """The kinds of tokens in a model of which some layers read several sequences in one.

    A part without a mask is images if the batch has any.
    """

    def __init__(
        self,
        spaces: Iterable[str],
        batch: Batch | Sequence[Any] | Tensor,
        warn: Callable[..., None],
    ) -> None:
        """Reads the masks.

        Args:
            spaces: token spaces of the model.
            batch: that runs.
            warn: called once with the module and the length of its input where all tokens of one
                longer than the padded text are said to be real.

        Raises:
            BatchError: if a mask is missing, or of a wrong rank.
        """
        self._warn = warn
        text = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._text = text if isinstance(text, Tensor) and bool((text == 0).any()) else None
        self._others: dict[str, Tensor | TokenKind] = {}
        self._parts: dict[str, list[Tensor | None]] = {}
        self._known: dict[tuple[str, torch.Size], Tensor | TokenKind] = {}
        images = isinstance(batch, Mapping) and "pixel_values" in batch
        self._rest = TokenKind.IMAGE if images else TokenKind.TEXT
        for space in spaces:
            if space.startswith(_PARTS):
                keys = json.loads(space.removeprefix(_PARTS))
                self._parts[space] = [None if k is None else _mask_of(k, batch) for k in keys]
            else:
                kind = TokenKind.IMAGE if space == _VISION else TokenKind.TEXT
                real = real_tokens(space, batch)
                self._others[space] = kind if real is None else real.to(torch.uint8) * kind

    def __call__(self, owner: Owner, inputs: Tensor) -> Tensor | TokenKind:
        """See `vlp_plugins.models.adapter.Kinds`.

        Raises:
            BatchError: if the input is not as long as its parts, or does not have the tokens of one
                sample after the other.
        """
        lead = inputs.shape[:-1]
        if owner.tokens == _ALL and self._text is not None:
            tokens, length = _per_sample(lead, len(self._text)), self._text.shape[1]
            if tokens is not None and tokens > length and not _IMAGE_PATH.search(owner.module):
                self._warn(owner.module, tokens, length)
        if owner.tokens in self._others:
            return self._others[owner.tokens]
        key = (owner.tokens, lead)
        if key not in self._known:
            self._known[key] = self._joined(owner, inputs)
        return self._known[key]

    def _joined(self, owner: Owner, inputs: Tensor) -> Tensor | TokenKind:
        parts, lead = self._parts[owner.tokens], inputs.shape[:-1]
        size = next((len(part) for part in parts if part is not None), None)
        if size is None:
            return self._rest
        if len(lead) < 2 and lead.numel() == size:
            return TokenKind.TEXT  # one vector per sample
        names = owner.tokens.removeprefix(_PARTS)
        tokens = _per_sample(lead, size)
        if tokens is None:
            raise BatchError(
                f"the input of {owner.module} is {list(inputs.shape)}, which are not the tokens of "
                f"{size} samples one after the other, so that its parts {names} cannot be found in "
                "it; exclude the layer (ModuleAdapter(exclude=...))"
            )
        rest = tokens - sum(part.shape[1] for part in parts if part is not None)
        if rest < 0 or (rest and None not in parts):
            raise BatchError(
                f"the input of {owner.module} has {tokens} tokens, but its parts {names} have "
                f"{tokens - rest}; name the masks of all its parts, and None for one whose tokens "
                "are all real"
            )
        kinds = [
            inputs.new_full((size, rest), int(self._rest), dtype=torch.uint8)
            if part is None
            else part.to(inputs.device, torch.uint8) * TokenKind.TEXT
            for part in parts
        ]
        return torch.cat(kinds, 1).reshape(lead)


def _per_sample(lead: torch.Size, size: int) -> int | None:
    """How many tokens a sample has in `[batch, tokens]`, also in one row; None in other shapes."""
    in_a_row = len(lead) == 1 or (len(lead) == 2 and lead[0] == 1)
    if lead.numel() % size or not (in_a_row or (len(lead) == 2 and lead[0] == size)):
        return None
    return lead.numel() // size


def _mask_key(space: str, batch: Batch | Sequence[Any] | Tensor) -> str | None:
    """Key of the batch that holds the mask of `space`; None if all its tokens are real."""
    if space.startswith(_MASK):
        return space.removeprefix(_MASK)
    if space == _ALL or not isinstance(batch, Mapping):
        return None
    if space == _VISION and "pixel_values" in batch:
        return None
    has_text = "input_ids" in batch or "attention_mask" in batch
    return "attention_mask" if has_text else None


logger = logging.getLogger("vlp_plugins.models.generic")

MODULE = "module"
"""The name of a `ModuleAdapter`, which any model can have."""

Loss = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
"""Takes the model and a batch as the loader made it; returns a scalar, or scalars by name."""

_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class ModuleAdapter(Adapter):
    """Every `Linear` and `Conv2d` weight of a model, named by the path of its module.

    Example:
        net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        adapter = vlp.ModuleAdapter(net, exclude=["^2$"])
        masks = vlp.prune(net, adapter=adapter, method="omp", sparsity=0.5)

    Not pruned: embeddings and what is tied to them (language-model heads), normalisation, biases
    and other vectors, grouped convolutions, `exclude`. Linears that share a weight are one.

    Batches are mappings (`model(**batch)`, values that the forward does not take are left out),
    tuples or lists (`model(*batch)`, cut to the parameters that have no default, so that loaders of
    `(inputs, labels)` work; a mapping gives optional inputs, too, also as the first item) or a
    tensor (`model(batch)`).

    Which tokens are real: with an `attention_mask` and no `pixel_values`, every layer obeys the
    mask; with both, layers whose path contains vision, visual, image or patch see real tokens only
    and the others obey the mask; without a mask everything is real. Say otherwise with `tokens`.
    """

    takes_sequences = True

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        modalities: Mapping[str, str] | None = None,
        exclude: Sequence[str] | str = (),
        tokens: Mapping[str, TokenMasks] | None = None,
        name: str = MODULE,
    ) -> None:
        """Describes models of the class of `model`, which is not kept.

        Args:
            model: the model to prune, wrapped (`torch.compile`, `DistributedDataParallel`) or not.
            loss: what gradient methods differentiate.
            modalities: regular expression -> modality. The first that is found in the path of a
                layer counts; `model` where none is.
            exclude: regular expressions; a layer in whose path one is found is not pruned.
            tokens: regular expression -> key of the batch that holds the `[batch, tokens]` mask of
                the layer's input, or None where all tokens are real. The first found counts. A list
                of these is for a sequence of several parts, in their order: `["attention_mask",
                None]` for words, then images; None would count the padding between them. A list,
                also of one mask, fits layers that read the tokens of all samples in one row, too.
            name: adapter name that masks carry.

        Raises:
            UnsupportedError: if a pattern is not a regular expression or is found in no path, if
                its value is of another type, if a list of masks is empty or has two parts without
                one, or if the model has lazy layers that were never run.
        """
        check_module(model)
        model = bare(model)
        if lazy := [path for path, p in model.named_parameters() if is_lazy(p)]:
            raise UnsupportedError(
                f"{lazy[0]} is lazy and has no shape yet; run the model on one batch first"
            )
        self.name = name
        self._type = type(model)
        self._warned = self._warned_of_padding = False
        self._loss = loss
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        self._modalities = _by_pattern("modalities", modalities, paths)
        for pattern, modality in self._modalities:
            if not isinstance(modality, str):
                raise UnsupportedError(
                    f"modalities: {pattern.pattern!r} has {modality!r:.80}; give the name of a "
                    "modality, such as 'vision'"
                )
        self._tokens = _by_pattern("tokens", tokens, paths)
        for pattern, masks in self._tokens:
            _check_masks(pattern.pattern, masks)
        self._exclude = patterns_of("exclude", exclude)
        _check_found("exclude", self._exclude, paths)

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
        for path, _, _ in prunable_parameters(model, asked_for(self._exclude)):
            modality = _first(self._modalities, path, "model")
            index = _INDEX.search(path)
            depth = int(index[1]) if index else 0
            space = token_space(path, self._tokens)
            yield WeightSpec(path, modality, depth, (Owner(path, space),))

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Explains every parameter that is not pruned, one entry per reason."""
        return explain_rest(model, asked_for(self._exclude))

    def streams(
        self, model: nn.Module, batch: Batch | Sequence[Any] | Tensor, *, published: bool = False
    ) -> Iterator[Stream]:
        """One stream, `forward`. An input `[B, features]` has no tokens to leave out.

        Raises:
            BatchError: if the batch does not fit the forward, or has text without a mask.
        """
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
            batch = batch[0]  # (inputs, labels)
        arguments = bind(model.forward, batch)
        if isinstance(batch, (tuple, list)) and len(batch) > len(arguments.args):
            self._warn(len(arguments.args), _left_out(arguments))
        spaces = {owner.tokens for spec in self.weights(model) for owner in spec.owners}
        if any(space == _ALL or space.startswith(_PARTS) for space in spaces):
            joint = JointTokens(sorted(spaces), batch, self._warn_of_padding)
            return iter((Stream("forward", lambda: forward_of(model, arguments), kinds=joint),))
        real = {space: real_tokens(space, batch) for space in sorted(spaces)}
        return iter((Stream("forward", lambda: forward_of(model, arguments), real),))

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

    def _warn_of_padding(self, module: str, tokens: int, words: int) -> None:
        """Says once that padding may be counted where all tokens are said to be real."""
        if not self._warned_of_padding:
            self._warned_of_padding = True
            logger.warning(
                "tokens says that all %d tokens that %s reads are real, but the batch has texts "
                "padded to %d: if these are among them, say ['attention_mask', None] for texts and "
                "then images, [None, 'attention_mask'] for images and then texts",
                tokens,
                module,
                words,
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
                "methods need; take a method without gradients, or in Python give one: "
                "ModuleAdapter(model, loss=lambda model, batch: ...)"
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
    arguments = bind(function, batch)
    output = function(*arguments.args, **arguments.kwargs)
    # transformers 5 returns an output object, earlier versions and other models a tensor.
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def patterns_of(argument: str, given: Sequence[str] | str) -> list[re.Pattern[str]]:
    """The regular expressions that the user gives as an argument: one, or several.

    Raises:
        UnsupportedError: if one is none.
    """
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise UnsupportedError(
            f"{argument}={given!r:.80} should be a regular expression, a text, or a list of them"
        )
    compiled = []
    for text in texts:
        try:
            compiled.append(re.compile(text))
        except re.error as error:
            raise UnsupportedError(
                f"{argument}: {text!r} is not a regular expression: {error}"
            ) from error
    return compiled


def _by_pattern(
    argument: str, given: Mapping[str, Any] | None, paths: Sequence[str]
) -> list[tuple[re.Pattern[str], Any]]:
    """Each compiled pattern of a mapping, with its value."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for text in given):
        raise UnsupportedError(
            f"{argument}={given!r:.80} should be a mapping from regular expressions, such as "
            f"{argument}={{'encoder': ...}}"
        )
    patterns = patterns_of(argument, list(given))
    _check_found(argument, patterns, paths)
    return list(zip(patterns, given.values(), strict=True))


def _check_found(argument: str, patterns: Sequence[re.Pattern[str]], paths: Sequence[str]) -> None:
    """Raises `UnsupportedError` for a pattern that no path has."""
    for pattern in patterns:
        if not any(pattern.search(path) for path in paths):
            some = ", ".join(path for path in paths[-3:] if path)
            raise UnsupportedError(
                f"{argument}: {pattern.pattern!r} is found in no layer's path (paths are like "
                f"{some})"
            )


def _check_masks(pattern: str, masks: object) -> None:
    """Raises `UnsupportedError` for what is no `TokenMasks`."""
    parts = masks if isinstance(masks, list | tuple) else [masks]
    if not parts or not all(part is None or isinstance(part, str) for part in parts):
        raise UnsupportedError(
            f"tokens: {pattern!r} has {masks!r:.80}; give the key of a mask in the batch, such as "
            "'attention_mask', None where all tokens are real, or a list of these for the parts of "
            "a joint sequence"
        )
    if parts.count(None) > 1:
        raise UnsupportedError(
            f"tokens: {pattern!r} has {parts.count(None)} parts without a mask, "
            "whose lengths cannot be told apart; give all but one a mask in the batch"
        )


def _first(patterns: list[tuple[re.Pattern[str], Any]], path: str, default: str) -> str:
    return next((value for pattern, value in patterns if pattern.search(path)), default)
