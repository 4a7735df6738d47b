"""What the pruner has to know about ViT and DINO, first to third: one tower, one modality."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlp_adapters.checkpoints import tensor_names
from vlp_adapters.classifiers import (
    TASK,
    classifier_logits,
    classifier_loss,
    image_classifier,
    tower_prefix,
)
from vlp_adapters.kinds import check_linear
from vlp_adapters.names import VIT_PARTS
from vlp_adapters.vit.original import (
    LAYER,
    load_original,
    original_part,
    timm_format,
    to_original_name,
)
from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    Exclusion,
    Negatives,
    OriginalPart,
    Owner,
    Stream,
    WeightSpec,
    need,
)

if TYPE_CHECKING:
    from PIL.Image import Image

VISION = "vision"

# Compared as text, so that asking about another model does not import transformers.
_CLASSES = frozenset(
    f"transformers.models.{module}.modeling_{module}.{name}"
    for module, family, heads in (
        ("vit", "ViT", ("Model", "ForImageClassification")),
        ("dinov2", "Dinov2", ("Model", "ForImageClassification")),
        (
            "dinov2_with_registers",
            "Dinov2WithRegisters",
            ("Model", "ForImageClassification"),
        ),
        ("dinov3_vit", "DINOv3ViT", ("Model",)),
    )
    for name in (family + head for head in heads)
)

_CANONICAL = {
    **VIT_PARTS,
    "mlp.gate_proj": "mlp.gate",  # SwiGLU of DINOv2 giant; DINOv3 has up and down at any size
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


class ViTAdapter(Adapter):
    """`ViTModel`, DINOv2 (with or without registers), their classifiers, and `DINOv3ViTModel`.

    The first DINO is a `ViTModel`. Class token and registers are tokens as all others.

    There is one modality, so the modality-wise budgets of MULTIFLOW are those of global magnitude.
    """

    name = "vit"

    def claims(self, model: nn.Module) -> bool:
        """True for these classes and what is derived from them."""
        return any(f"{c.__module__}.{c.__qualname__}" in _CLASSES for c in type(model).__mro__)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """Query, key, value, output and the MLP of every layer."""
        for path, module in model.named_modules():
            match = LAYER.fullmatch(path)
            if match is None or match[5] or match[4] not in _CANONICAL:
                continue
            check_linear(path, module)
            depth = int(match[3])
            canonical = f"{VISION}.{depth}.{_CANONICAL[match[4]]}"
            yield WeightSpec(canonical, VISION, depth, (Owner(path, VISION),))

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """All that is outside the layers, and the vectors inside them."""
        return (
            Exclusion(r"(^|\.)classifier\.", "classifier: belongs to the task, not to the tower"),
            Exclusion(r"(^|\.)pooler\.", "pooler: a head that reads the class token only"),
            Exclusion(r"(^|\.)embeddings\.", "embeddings: patches, positions, class token"),
            Exclusion(r"(^|\.)(layernorm\w*|norm\d?)\.", "normalisation"),
            Exclusion(r"\.layer_scale\d\.", "scale per channel"),
            Exclusion(r"\.bias$", "bias"),
        )

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """One stream, `vision`; every token of an image is real."""
        (pixels,) = need(batch, "pixel_values")
        return iter((Stream(VISION, lambda: model(pixel_values=pixels), {VISION: None}),))

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the classifier, `ce`. There are no hard negatives to choose.

        Args:
            model: a classifier of `C` classes.
            batch: `pixel_values` and `labels`, `[B]` integers from 0 to C - 1.
            negatives: ignored.
            published: ignored.

        Raises:
            UnsupportedError: if the model has no classifier.
            BatchError: if the batch has no labels, or labels that do not fit.
        """
        (pixels,) = need(batch, "pixel_values")
        return {"ce": classifier_loss(model, {"pixel_values": pixels}, batch)}

    def classify(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B, C]` logits of `pixel_values`.

        Raises:
            UnsupportedError: if the model has no classifier.
        """
        (pixels,) = need(batch, "pixel_values")
        return classifier_logits(model, {"pixel_values": pixels})

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """`pretraining`: every weight stays; `classification`: into the family's classifier."""
        if task not in ("pretraining", TASK):
            return super().for_task(task, model)
        prefix = tower_prefix(model) if task == TASK else ""
        return {spec.name: (prefix + spec.owners[0].path,) for spec in self.weights(model)}

    def downstream_model(
        self,
        task: str,
        model: nn.Module,
        *,
        tokenizer: Any | None = None,
        classes: int | None = None,
    ) -> nn.Module:
        """See `image_classifier`; `classification` is the only task."""
        if task != TASK:
            return super().downstream_model(task, model)
        return image_classifier(model, classes)

    def load(self, source: str) -> nn.Module | None:
        """Loads a checkpoint file of timm or of DINO's code; folders are left to transformers.

        Raises:
            UnsupportedError: if it is one, but damaged, or a kind that is not supported.
        """
        path = Path(source)
        return load_original(path) if timm_format(tensor_names(path)) else None

    def describe(self, source: str) -> str | None:
        """What a checkpoint file of timm or of DINO's code is; see `timm_format`."""
        form = timm_format(tensor_names(Path(source)))
        return form.title if form else None

    def collate(
        self, processor: Any, images: Sequence[Image], texts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Makes one batch of `B` images. The model reads no text, so captions are left out."""
        return dict(processor(images=list(images), return_tensors="pt"))

    def original_name(self, path: str) -> str | None:
        """See `to_original_name`."""
        return to_original_name(path)

    def original_part(self, path: str) -> OriginalPart | None:
        """See `original.original_part`."""
        return original_part(path)
