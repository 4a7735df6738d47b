"""What the adapters of CLIP and SigLIP have in common: two towers that never meet inside."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from vlp_adapters.checkpoints import (
    is_torchscript,
    load_saved,
    reject_torchscript,
    tensor_names,
)
from vlp_adapters.classifiers import classifier_logits, classifier_loss, image_classifier
from vlp_adapters.clip.inputs import TowerInputs, images_of
from vlp_adapters.clip.names import checkpoint_file, format_of
from vlp_adapters.clip.weights import TEXT, VISION, downstream_paths, weight_specs
from vlp_adapters.inputs import need_partners
from vlp_adapters.kinds import Classes, Kind, kind_among
from vlp_plugins.data.processors import reads_text
from vlp_plugins.models.adapter import Adapter, Batch, Exclusion, Negatives, Stream, WeightSpec
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image


class TwoTowerAdapter(Adapter):
    """Names, streams and losses of models with a vision and a text tower, or one of them.

    A subclass says which classes they are, what is excluded, how a batch is made, what the text
    tower reads of it, how a tower's states become features, and what the contrastive loss is.
    """

    title: ClassVar[str]
    """How errors call the family."""
    classes: ClassVar[Classes]
    excluded: ClassVar[Sequence[Exclusion]]
    saved: ClassVar[Mapping[str, str]] = {}
    """Classes that are not of transformers; see `load_saved`."""

    @abstractmethod
    def texts_of(self, tower: Any, batch: Batch) -> TowerInputs:
        """What the text tower reads of a batch."""

    @abstractmethod
    def text_options(self, tokenizer: Any) -> dict[str, Any]:
        """How captions are padded: keywords of the tokenizer."""

    @abstractmethod
    def embed(self, model: Any, modality: str, inputs: TowerInputs) -> Tensor:
        """L2-normalised `[B, D]` features of images (`vision`) or texts (`text`).

        Raises:
            UnsupportedError: if the class has no projection for them.
        """

    @abstractmethod
    def contrast(self, model: Any, images: Tensor, texts: Tensor) -> Tensor:
        """The contrastive loss of `B` pairs of L2-normalised features `[B, D]`."""

    def claims(self, model: nn.Module) -> bool:
        """True for the classes of the family and what is derived from them."""
        return kind_among(self.classes, model) is not None

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """All linear layers inside the towers; nothing is shared between them."""
        return weight_specs(self._kind(model), model)

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Projections, heads, embeddings and vectors."""
        return self.excluded

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """`vision` and `text`, as far as the class has them.

        Raises:
            BatchError: if inputs are missing or do not fit each other.
        """
        return iter(
            [
                Stream(name, partial(_run, tower_of(model, name), inputs), {name: inputs.real})
                for name, inputs in self._inputs(model, batch).items()
            ]
        )

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """`itc`, the contrastive loss within the batch; of a classifier `ce`, its cross-entropy.

        All other pairs of the batch are negatives. Pre-training gathered features from many
        processes; here a batch is on one, so it should be as large as memory allows.

        Args:
            model: a model that this adapter claims.
            batch: at least two matching pairs; for a classifier images and `labels`.
            negatives: ignored.
            published: ignored.

        Raises:
            BatchError: if inputs are missing or do not fit each other.
            UnsupportedError: if the model is one tower, without any loss.
        """
        kind = self._kind(model)
        if kind in (Kind.VISION, Kind.TEXT):
            raise UnsupportedError(
                f"{type(model).__name__} is one tower and has no loss; load the {self.title} model "
                "with both, or give a loss with ModuleAdapter(model, loss=...)"
            )
        inputs = self._inputs(model, batch)
        if kind is Kind.CLASSIFIER:
            return {"ce": classifier_loss(model, inputs[VISION].arguments, batch)}
        need_partners(len(inputs[TEXT]), "contrastive")
        images, texts = (self.embed(model, name, inputs[name]) for name in (VISION, TEXT))
        return {"itc": self.contrast(model, images, texts)}

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Paths for `pretraining`, `retrieval` and `classification`; see `downstream_paths`."""
        return downstream_paths(task, self._kind(model), model, self.title)

    def downstream_model(
        self,
        task: str,
        model: nn.Module,
        *,
        tokenizer: Any | None = None,
        classes: int | None = None,
    ) -> nn.Module:
        """`retrieval`: the dual encoder itself; `classification`: see `image_classifier`."""
        kind = self._kind(model)
        if task == "retrieval" and kind is Kind.DUAL:
            return model
        if task == Kind.CLASSIFIER and kind in (Kind.DUAL, Kind.CLASSIFIER):
            return image_classifier(model, classes)
        raise UnsupportedError(
            f"{type(model).__name__} is not fine-tuned on {task!r}: a dual encoder of {self.title} "
            f"is, on retrieval and {Kind.CLASSIFIER}"
        )

    def collate(
        self, processor: Any, images: Sequence[Image], texts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Makes one batch of `B` images and, if the processor has a tokenizer, `B` captions."""
        if not reads_text(processor):
            return dict(processor(images=list(images), return_tensors="pt"))
        return dict(
            processor(
                images=list(images),
                text=list(texts),
                truncation=True,
                return_tensors="pt",
                **self.text_options(processor.tokenizer),
            )
        )

    def image_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, D]` of the images of a batch."""
        return self.embed(model, VISION, self._inputs_of(VISION, model, batch))

    def text_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, D]` of the texts of a batch."""
        return self.embed(model, TEXT, self._inputs_of(TEXT, model, batch))

    def classify(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B, C]` logits of the images of a batch.

        Raises:
            UnsupportedError: if the model has no classifier.
        """
        return classifier_logits(model, self._inputs_of(VISION, model, batch).arguments)

    def load(self, source: str) -> nn.Module | None:
        """Loads a checkpoint of OpenAI's CLIP or of open_clip, or a folder of open_clip.

        Folders of transformers are not for here, except the one of a class of ours.

        Raises:
            UnsupportedError: if it is the family's, but damaged, or a kind that is not supported;
                or if it is a TorchScript archive, as OpenAI publishes them: the error says how to
                convert it.
        """
        path = Path(source)
        if (saved := load_saved(path, self.saved, self.title)) is not None:
            return saved
        file = checkpoint_file(path)
        reject_torchscript(file)
        form = format_of(tensor_names(file))
        if form is None or form.family != self.name:
            return None
        from vlp_adapters.clip.convert import load_original

        return load_original(file)

    def describe(self, source: str) -> str | None:
        """What a checkpoint of OpenAI's CLIP or of open_clip is; see `format_of`."""
        file = checkpoint_file(Path(source))
        if is_torchscript(file):
            return "TorchScript archive, as OpenAI publishes CLIP"
        form = format_of(tensor_names(file))
        return form.title if form is not None and form.family == self.name else None

    def _kind(self, model: nn.Module) -> Kind:
        return cast("Kind", kind_among(self.classes, model))

    def _inputs_of(self, modality: str, model: nn.Module, batch: Batch) -> TowerInputs:
        if modality not in _modalities(self._kind(model)):
            raise UnsupportedError(
                f"{type(model).__name__} has no {modality} tower; load the {self.title} model with "
                "both"
            )
        tower = tower_of(model, modality)
        return images_of(tower, batch) if modality == VISION else self.texts_of(tower, batch)

    def _inputs(self, model: nn.Module, batch: Batch) -> dict[str, TowerInputs]:
        """Of every tower; images and texts of a dual encoder are as many."""
        names = _modalities(self._kind(model))
        inputs = {name: self._inputs_of(name, model, batch) for name in names}
        if len({len(read) for read in inputs.values()}) > 1:
            raise BatchError(
                f"a batch has {len(inputs[VISION])} images and {len(inputs[TEXT])} texts; give as "
                "many of both"
            )
        return inputs


def tower_of(model: nn.Module, modality: str) -> Any:
    """The vision or the text tower; a model that is one tower is returned itself."""
    return getattr(model, f"{modality}_model", model)


def states_of(model: nn.Module, modality: str, inputs: TowerInputs) -> Any:
    """What a tower returns: `last_hidden_state` `[B, tokens, D]` and `pooler_output` `[B, D]`."""
    return _run(tower_of(model, modality), inputs)


def _run(tower: Any, inputs: TowerInputs) -> Any:
    return tower(**inputs.arguments)


def _modalities(kind: Kind) -> tuple[str, ...]:
    return {
        Kind.DUAL: (VISION, TEXT),
        Kind.VISION: (VISION,),
        Kind.CLASSIFIER: (VISION,),
        Kind.TEXT: (TEXT,),
    }[kind]
