"""What an adapter says about a model: value types and the `Adapter` base class.

An adapter is the only place that knows a model family. Everything else (statistics, scores,
allocation, masks, hosts) works on what is declared here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vlp_plugins.runtime.errors import BatchError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

Batch = Mapping[str, Any]
"""What a model takes: tensors by the names of its forward (`pixel_values`, `input_ids`, ...)."""

Negatives = tuple[Sequence[int], Sequence[int]]
"""Hard negatives of the matching loss: for every text an image, for every image a text."""


ReadRows = Callable[
    ["nn.Module", "tuple[Any, ...]", "dict[str, Any]", "torch.Tensor | None"],
    "tuple[torch.Tensor, torch.Tensor | None]",
]
"""Takes a module, the arguments of a call of it, and which tokens of the first one are real (None:
all); returns the rows `[..., in]` that one of its matrices reads, and which of them are real."""


@dataclass(frozen=True, slots=True)
class WeightView:
    """The view of a parameter that is the matrix `[out, in]` of a weight.

    Attributes:
        index: along dimension 0, of a parameter that holds a matrix for each expert; None: all.
        rows: first row and that after the last one, of one that holds several projections.
        transposed: whether it is stored as `[in, out]`.
        reads: what the matrix reads; None: the first argument of its module.
    """

    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    reads: ReadRows | None = None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """A view of a tensor of the parameter's shape, a gradient for instance."""
        values = values if self.index is None else values[self.index]
        values = values if self.rows is None else values[slice(*self.rows)]
        return values.T if self.transposed else values


@dataclass(frozen=True, slots=True)
class Owner:
    """One module that uses a weight.

    Attributes:
        module: dotted path of the module in this model.
        tokens: name of the token space of the module's *input* (`"vision"`, `"text"`), a key of
            `Stream.real`. The keys and values of a cross-attention read image tokens.
        parameter: attribute of the module that holds the weight.
        view: of that parameter; None: the whole.
    """

    module: str
    tokens: str
    parameter: str = "weight"
    view: WeightView | None = None

    @property
    def path(self) -> str:
        """Dotted path of the parameter."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One prunable weight as the adapter declares it.

    Attributes:
        name: canonical name (`text.3.cross.query`), the same in every flavour of the family.
        modality: open string (`vision`, `text`, `fusion`, ...).
        depth: layer index within its tower, from 0.
        owners: the modules that use it; the first is the owner that published code reads.
        copy_of: canonical name of the pre-training weight that this one was copied from
            (a decoder initialised from the encoder); it inherits that weight's mask.
    """

    name: str
    modality: str
    depth: int
    owners: tuple[Owner, ...]
    copy_of: str | None = None


@dataclass(frozen=True, slots=True)
class OriginalPart:
    """Where the original code base keeps a parameter.

    Attributes:
        name: of its tensor.
        part: which part of the tensor's first dimension, from 0.
        of: number of equal parts; 3 where query, key and value are one tensor.
    """

    name: str
    part: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Parameters that are not pruned.

    Attributes:
        pattern: regular expression searched in their paths.
        reason: for the reader.
        by_design: False if they would be pruned if it could be done: a warning of `prune` says
            what share of the model that concerns.
    """

    pattern: str
    reason: str
    by_design: bool = True


class TokenKind(IntEnum):
    """What a position of a sequence holds. All but `PADDING` are real."""

    PADDING = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3
    AUDIO = 4
    QUERY = 5


Kinds = Callable[[Owner, "torch.Tensor"], "torch.Tensor | TokenKind"]
"""The kinds of the tokens that enter a module now, from the module and its input `[..., features]`.

A uint8 tensor of the input's leading dimensions that holds `TokenKind`s, or one kind of them all.
"""


@dataclass(frozen=True, slots=True)
class Places:
    """Which sample each position is of that one call of a module gives out.

    Attributes:
        samples: int64, of the leading dimensions of the output.
        whole: whether that is all that the stream has of these samples there; False where it calls
            the module again for the rest: image by image, or for images and then for videos.
    """

    samples: torch.Tensor
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Stream:
    """One part of the activation probe: what to run, and which positions are real meanwhile.

    Attributes:
        name: `vision`, `text`, `fusion`, `decoder`, ...; statistics are kept per (weight, stream).
        run: runs that part of the model and returns what it gives out: a tensor, or an output of
            transformers. Streams of a batch run in order and may share state.
        real: by token space, a bool tensor `[batch, tokens]` that is true where a token is real;
            None where all are.
        kinds: in place of `real`, for models that read several kinds of tokens in one sequence, or
            call one module with several sequences. It is asked while `run` runs.
        samples: for models in which dimension 0 of what modules give out is not that of samples
            (images, tiles, packed patches): takes a module, the leading dimensions of what it
            gives out, and how often the stream has called it before. It is asked while `run` runs,
            and returns the sample of each position; None if dimension 0 is the samples'.
    """

    name: str
    run: Callable[[], object]
    real: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    kinds: Kinds | None = None
    samples: Callable[[Owner, torch.Size, int], Places | None] | None = None


class Adapter(ABC):
    """Describes one model family. Subclasses need `name`, `claims`, `weights` and `streams`.

    Attributes:
        name: what users call it.
        general: True for one that claims models of any family: it is asked after all others.
        takes_sequences: True for one that reads batches that are tuples, lists or tensors; others
            get mappings of them.
    """

    name: str = ""
    general: bool = False
    takes_sequences: bool = False

    @abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """True if this adapter describes `model`."""

    @abstractmethod
    def weights(self, model: nn.Module) -> Iterable[WeightSpec]:
        """Every prunable weight of `model`, in the order of its parameters, each exactly once."""

    @abstractmethod
    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """The task-agnostic forward of one batch: no hard negatives, no masked tokens.

        Args:
            model: a model that this adapter claims.
            batch: tensors on the model's device.
            published: reproduce what the published code does where it departs from the idea.

        Raises:
            BatchError: if the batch lacks an input, for instance the attention mask.
        """

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """What is not pruned, and why. The first pattern that matches a parameter explains it."""
        return ()

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """Paths of the modules that the block-by-block pass runs and prunes one at a time.

        Together they hold every module that uses a weight; none is inside of another. By default
        the elements of the outermost lists of modules, and what stands outside by itself.
        """
        owners = (owner.module for spec in self.weights(model) for owner in spec.owners)
        return blocks_with(model, owners)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The terms of the pre-training loss by name; gradient methods use their plain sum.

        Random choices depend on the batch and the model only, never on the global random state. The
        arguments are those of `streams`; hard negatives of the matching loss are drawn if None are
        given.

        Raises:
            UnsupportedError: if the family has no loss of its own.
            BatchError: if the batch lacks what the loss needs (labels, captions).
        """
        raise UnsupportedError(
            f"adapter {self.name!r} defines no loss; give one with ModuleAdapter(model, loss=...)"
        )

    def loss_state(self, model: nn.Module) -> Iterable[torch.Tensor]:
        """Buffers and parameters that `losses` changes (queues, momentum copies), to be restored.

        Prunable weights are never among them.
        """
        return ()

    def advance(  # noqa: B027 - most losses change nothing
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> None:
        """Changes `loss_state` as `losses` of this batch would, without computing the losses.

        Several processes share the batches: each computes its own, and advances past the others'.
        """

    def split_fused(self, model: nn.Module) -> None:  # noqa: B027 - most models fuse nothing
        """Replaces layers that hold several projections by one layer for each, in place.

        What the model computes stays the same; a model that is split already stays as it is.
        """

    def followers(self, model: nn.Module) -> dict[str, str]:
        """Networks that copy another one's weights in training (momentum twins).

        Returns:
            By module path the path of the module that follows it, of the same structure: where
            rows and columns of the one are cut, those of the other are too.
        """
        return {}

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Where each weight of a pre-training model goes in the downstream model of a task.

        Args:
            task: `pretraining`, `retrieval`, `captioning`, `vqa`, `nlvr2` or `classification`.
            model: the pre-training model.

        Returns:
            By canonical name the parameter paths in the downstream model. Several paths mean
            that the weight is copied (a decoder initialised from the encoder): every copy
            inherits the mask. A weight that the task does not use maps to `()`.
        """
        raise UnsupportedError(f"adapter {self.name!r} knows no downstream task {task!r}")

    def downstream_model(
        self,
        task: str,
        model: nn.Module,
        *,
        tokenizer: Any | None = None,
        classes: int | None = None,
    ) -> nn.Module:
        """The model that is fine-tuned on a task, with the weights of a pre-training model.

        Masks of the pre-training model fit it. What the task adds is drawn at random.

        Args:
            task: see `for_task`.
            model: is not changed; it is returned itself if it can be trained on the task as it is.
            tokenizer: of the texts, where the model must know how they begin and end.
            classes: how many a classifier tells apart.

        Raises:
            UnsupportedError: if the family knows no such task, or the model is of another one.
        """
        raise UnsupportedError(f"adapter {self.name!r} makes no model of the task {task!r}")

    def task_losses(self, task: str, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms of the loss of a task by name, whose plain sum is trained.

        By default `losses`, which a model of a single task has of that task. The model is what
        `downstream_model` returns.

        Raises:
            UnsupportedError: if the model is of another task.
            BatchError: if the batch lacks what the loss needs.
        """
        return self.losses(model, batch)

    def load(self, source: str) -> nn.Module | None:
        """Loads a checkpoint in a format that only this family knows.

        Args:
            source: a local file or folder, or a hub id.

        Returns:
            The model in evaluation mode, or None if the format is not this family's.
        """
        return None

    def describe(self, source: str) -> str | None:
        """What a checkpoint in a format that only this family knows is, without loading it.

        Returns:
            A noun phrase ("X-VLM checkpoint of retrieval, CLIP vision tower"), also for what `load`
            refuses; None if the format is not this family's.
        """
        return None

    def collate(
        self, processor: Any, images: Sequence[Image], texts: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Makes one batch of `B` images and `B` captions (right padding to the longest caption)."""
        return dict(
            processor(
                images=list(images),
                text=list(texts),
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
        )

    def settings(self) -> dict[str, Any]:
        """Keywords of its class that make this adapter again; JSON can keep them.

        Masks carry it, so that they can be applied later without an adapter at hand.
        """
        return {}

    def original_name(self, path: str) -> str | None:
        """The name that the original code base gives to parameter `path`; None if it has none."""
        return None

    def original_part(self, path: str) -> OriginalPart | None:
        """Where the original code base keeps parameter `path`; None if it has no such parameter.

        For families whose original keeps several parameters in one tensor; for all others
        `original_name` is enough.
        """
        name = self.original_name(path)
        return None if name is None else OriginalPart(name)


@runtime_checkable
class RetrievalAdapter(Protocol):
    """An adapter whose models embed images and texts in one space."""

    def image_features(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """L2-normalised `[B, D]` features of the images of a batch."""

    def text_features(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """L2-normalised `[B, D]` features of the texts of a batch."""


@runtime_checkable
class MatchingAdapter(Protocol):
    """An adapter whose models score an image and a text together (re-ranking)."""

    def match(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """`[B]` log-odds that image and text of each row belong together."""


@runtime_checkable
class ImageTokensAdapter(Protocol):
    """An adapter that encodes images apart, so that an image that is asked of often runs once."""

    def image_embeds(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """`[B, T, D]` that `match` reads as `image_embeds` of a batch without `pixel_values`."""


@runtime_checkable
class CaptioningAdapter(Protocol):
    """An adapter whose models write captions."""

    def caption(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> torch.Tensor:
        """`[B, L]` token ids by beam search; one beam is greedy."""


@runtime_checkable
class AnsweringAdapter(Protocol):
    """An adapter whose models answer the questions (`input_ids`) about the images of a batch."""

    def answer(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> torch.Tensor:
        """`[B, L]` token ids of written answers."""

    def rank_answers(
        self,
        model: nn.Module,
        batch: Batch,
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        *,
        candidates: int,
    ) -> torch.Tensor:
        """`[B]` numbers of the most likely answers among a list.

        Args:
            model: a model that this adapter claims.
            batch: images and questions on the model's device.
            answer_ids: `[M, A]` int64, the answers as the tokenizer makes them.
            answer_mask: `[M, A]`, 1 for real tokens.
            candidates: how many, chosen by their first word, are looked at as a whole.
        """


@runtime_checkable
class ClassifyingAdapter(Protocol):
    """An adapter whose models tell classes of images apart."""

    def classify(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """`[B, C]` logits of the images of a batch."""


@runtime_checkable
class StatementAdapter(Protocol):
    """An adapter whose models say whether a statement is true of two images (NLVR2).

    A batch has `pixel_values` `[B, 2, 3, H, W]`, the left image of a row first, the statements as
    `input_ids` and `attention_mask` `[B, L]`, and for the loss `labels` `[B]`: 1 true, 0 false. It
    is made by `collate`, which gets the left images of all rows, then the right ones, and as many
    texts as rows.
    """

    def judge(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """`[B]` log-odds that the statement of each row is true of its two images."""


def need(batch: Batch, *keys: str) -> list[torch.Tensor]:
    """The values of `keys`; a `BatchError` that names what is missing otherwise."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"batch is a {type(batch).__name__}, not a mapping of "
            f"{', '.join(keys) or 'tensors by name'}; make batches with the model's processor"
        )
    missing = [key for key in keys if batch.get(key) is None]
    if missing:
        hint = ""
        if "input_ids" in missing:
            hint = (
                ": the model reads text; make batches with its processor, whose folder needs "
                "tokenizer.json (or vocab.txt) and tokenizer_config.json"
            )
        elif "attention_mask" in missing:
            hint = "; make batches with the model's processor and padding=True, which returns one"
        raise BatchError(f"batch has no {', '.join(missing)} (it has: {', '.join(batch)}){hint}")
    return [batch[key] for key in keys]


def blocks_with(
    model: nn.Module, modules: Iterable[str], is_block: Callable[[nn.Module], bool] | None = None
) -> list[str]:
    """The blocks that modules stand in, in the order of the modules.

    Args:
        model: that they are of.
        modules: their paths.
        is_block: whether an element of a list of modules is one. The outermost that is counts, or
            else the outermost element; a module outside of all lists is a block by itself.
    """
    found: dict[str, None] = {}
    for path in modules:
        parts = path.split(".")
        outer = (".".join(parts[:n]) for n, part in enumerate(parts, 1) if part.isdigit())
        lists = [each for each in outer if _in_list(model, each)] or [path]
        if is_block is not None:
            lists = [each for each in lists if is_block(model.get_submodule(each))] or lists
        found[lists[0]] = None
    return [path for path in found if not any(path.startswith(f"{each}.") for each in found)]


def _in_list(model: nn.Module, path: str) -> bool:
    """Whether a module is an element of a list, and no list itself, which may never be called."""
    outer, own = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    return _is_list(outer) and not _is_list(own)


def _is_list(module: nn.Module) -> bool:
    return type(module).__name__ in ("ModuleList", "Sequential")
