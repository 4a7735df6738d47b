"""X-VLM as pruning sees it: three modalities, three streams, three losses, downstream models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from vlp_adapters.checkpoints import from_folder, is_saved_as, options_beside, tensor_names
from vlp_adapters.inputs import need_partners
from vlp_adapters.kinds import Kind, check_task
from vlp_adapters.negatives import generator_of
from vlp_adapters.xvlm import downstream, task_passes
from vlp_adapters.xvlm.abilities import XvlmAbilities
from vlp_adapters.xvlm.kinds import MATCHING, kind_of, require
from vlp_adapters.xvlm.masking import mask_words, word_targets
from vlp_adapters.xvlm.names import description, is_original, original_part, to_original_name
from vlp_adapters.xvlm.streams import activation_streams, matching_pairs
from vlp_adapters.xvlm.task_weights import task_exclusions, task_weight_specs
from vlp_adapters.xvlm.weights import EXCLUSIONS, downstream_paths, weight_specs
from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    Exclusion,
    Negatives,
    OriginalPart,
    Stream,
    WeightSpec,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlp_adapters.xvlm.modeling import XvlmForRetrieval

_SAVED = {  # model type of a configuration -> class in this package
    "vlp_xvlm_pretrain": ("modeling", "XvlmForPretraining"),
    "vlp_xvlm_retrieval": ("modeling", "XvlmForRetrieval"),
    "vlp_xvlm_captioning": ("captioning", "XvlmForCaptioning"),
    "vlp_xvlm_answering": ("answering", "XvlmForQuestionAnswering"),
    "vlp_xvlm_nlvr": ("nlvr", "XvlmForNlvr"),
}
_INPUTS = ("pixel_values", "input_ids", "attention_mask")


class XvlmAdapter(XvlmAbilities, Adapter):
    """X-VLM's models of pre-training, retrieval, captioning, VQA and NLVR2.

    Canonical names are `vision.{i}.attention.query`, `text.{i}.self.query`,
    `fusion.{j}.cross.query`, `fusion.{j}.ffn.fc1`; see `weight_specs` for the numbers, and
    `task_weight_specs` for the decoder of the answers and the pairs of layers of NLVR2.
    """

    name = "xvlm"

    def claims(self, model: nn.Module) -> bool:
        """True for these classes and what is derived from them."""
        return kind_of(model) is not None

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """All linear layers of the three towers; nothing is shared among them."""
        kind = _kind(model)
        return weight_specs(_xvlm(model)) if kind in MATCHING else task_weight_specs(kind, model)

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Projections, heads, embeddings and vectors."""
        kind = _kind(model)
        return EXCLUSIONS if kind in MATCHING else task_exclusions(kind, model)

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """`vision`, `text` and `fusion`, to be run in this order; see `activation_streams`.

        Those of downstream models: see `task_streams`.
        """
        kind = _kind(model)
        if kind not in MATCHING:
            return task_passes.task_streams(kind, model, batch)
        return activation_streams(_xvlm(model), batch, published=published)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """`itc` contrastive, `itm` matching, `mlm` masked words (not of the retrieval model).

        Of the other downstream models `lm`, or `nlvr` for judgements.

        Masked words come from the batch (`mlm_input_ids`, `mlm_labels`) or are made, see
        `word_targets`; negatives that are not given are drawn by similarity. Both choices depend on
        the batch and the model only, never on the global random state.

        Args:
            model: a model that this adapter claims.
            batch: `B` matching pairs, at least two.
            negatives: for every text a wrong image, for every image a wrong text.
            published: ignored.

        Raises:
            BatchError: if inputs are missing or do not fit each other.
        """
        kind = _kind(model)
        if kind is Kind.RETRIEVAL:
            return downstream.retrieval_losses(_xvlm(model), batch, negatives)
        if kind is not Kind.PRETRAINING:
            return task_passes.task_losses(kind, model, batch)
        xvlm: Any = model
        pixels, ids, mask = matching_pairs(xvlm, batch)
        need_partners(len(ids))
        masked, labels = word_targets(xvlm.config.text_config, batch)
        output = xvlm(
            pixel_values=pixels,
            input_ids=ids,
            attention_mask=mask,
            mlm_input_ids=masked,
            mlm_labels=labels,
            negatives=negatives,
            generator=generator_of(ids),
        )
        return dict(output.losses)

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Paths in the model of the task; see `downstream_paths`.

        Raises:
            UnsupportedError: if the task is unknown, or the model is a downstream one already.
        """
        if task == Kind.PRETRAINING:  # every model's own paths
            return {spec.name: (spec.owners[0].path,) for spec in self.weights(model)}
        if task != Kind.RETRIEVAL or kind_of(model) is not Kind.RETRIEVAL:
            require(model, Kind.PRETRAINING, f"has no weights to hand on to the {task} model")
        return downstream_paths(task, _xvlm(model))

    def downstream_model(
        self,
        task: str,
        model: nn.Module,
        *,
        tokenizer: Any | None = None,
        classes: int | None = None,
    ) -> nn.Module:
        """See `downstream.downstream_model`."""
        return downstream.downstream_model(task, model, tokenizer)

    def task_losses(self, task: str, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Retrieval: `itc` and `itm`. Captioning, VQA: `lm`. NLVR2: `nlvr`.

        Raises:
            UnsupportedError: if the model is of another task.
            BatchError: if inputs are missing or do not fit each other.
        """
        check_task(task, model, kind_of(model))
        if task == Kind.RETRIEVAL:
            return downstream.retrieval_losses(_xvlm(model), batch)
        return self.losses(model, batch)

    def load(self, source: str) -> nn.Module | None:
        """Loads what `save_pretrained` wrote, or an original `.pth` or `.safetensors` file.

        Finding out that it is neither is cheap and quiet.

        Raises:
            UnsupportedError: if it is X-VLM's, but damaged or incomplete.
        """
        path = Path(source)
        for model_type, (module, name) in _SAVED.items():
            if is_saved_as(path, model_type):
                home = import_module(f"vlp_adapters.xvlm.{module}")
                return from_folder(getattr(home, name), path, "X-VLM")
        if not is_original(tensor_names(path)):
            return None
        from vlp_adapters.xvlm.convert import OPTIONS, load_original

        return load_original(path, **options_beside(path, OPTIONS))

    def describe(self, source: str) -> str | None:
        """Task and image encoder of an original file, also of one that is refused."""
        names = tensor_names(Path(source))
        return description(names) if is_original(names) else None

    def collate(
        self, processor: Any, images: Sequence[Image], texts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Makes one batch of `B` images and `B` captions, padded on the right.

        If the processor's tokenizer has a mask token, the batch also has `mlm_input_ids` and
        `mlm_labels`: the tokenizer is known here and nowhere later.
        """
        made = super().collate(processor, images, texts)
        batch = {key: made[key] for key in _INPUTS if key in made}
        tokenizer = getattr(processor, "tokenizer", None)
        mask_token_id = getattr(tokenizer, "mask_token_id", None)
        if tokenizer is not None and mask_token_id is not None:
            batch["mlm_input_ids"], batch["mlm_labels"] = mask_words(
                batch["input_ids"],
                batch["attention_mask"],
                mask_token_id=mask_token_id,
                vocab_size=len(tokenizer),
                special_ids=tokenizer.all_special_ids,
            )
        return batch

    def original_name(self, path: str) -> str | None:
        """The name that the X-VLM code base gives to parameter `path`."""
        return to_original_name(path)

    def original_part(self, path: str) -> OriginalPart | None:
        """See `names.original_part`."""
        return original_part(path)


def _kind(model: nn.Module) -> Kind:
    return cast("Kind", kind_of(model))


def _xvlm(model: nn.Module) -> XvlmForRetrieval:
    return cast("XvlmForRetrieval", model)
