"""X-VLM as pruning sees it: three modalities, three streams, three losses, downstream models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from vlp_adapters.checkpoints import load_saved, tensor_names
from vlp_adapters.inputs import need_partners
from vlp_adapters.kinds import Kind, check_task
from vlp_adapters.objectives import losses_of_pairs
from vlp_adapters.xvlm import task_passes
from vlp_adapters.xvlm.kinds import MATCHING, kind_of, require
from vlp_adapters.xvlm.masking import mask_words, word_targets
from vlp_adapters.xvlm.names import description, is_original, original_part, to_original_name
from vlp_adapters.xvlm.streams import (
    activation_streams,
    image_embeds_of,
    matching_pairs,
    text_embeds_of,
)
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
    need,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlp_adapters.xvlm.captioning import XvlmForCaptioning
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval

_SAVED = {  # model type of a configuration -> class
    "vlp_xvlm_pretrain": "xvlm.modeling.XvlmForPretraining",
    "vlp_xvlm_retrieval": "xvlm.modeling.XvlmForRetrieval",
    "vlp_xvlm_captioning": "xvlm.captioning.XvlmForCaptioning",
    "vlp_xvlm_answering": "xvlm.answering.XvlmForQuestionAnswering",
    "vlp_xvlm_nlvr": "xvlm.nlvr.XvlmForNlvr",
}
_INPUTS = ("pixel_values", "input_ids", "attention_mask")


class XvlmAdapter(Adapter):
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
            return task_passes.retrieval_losses(_xvlm(model), batch, negatives)
        if kind is not Kind.PRETRAINING:
            return task_passes.task_losses(kind, model, batch)
        xvlm = _xvlm(model)
        pairs = matching_pairs(xvlm, batch)
        need_partners(len(pairs[1]))
        masked, labels = word_targets(xvlm.config.text_config, batch)
        return losses_of_pairs(
            xvlm, pairs, mlm_input_ids=masked, mlm_labels=labels, negatives=negatives
        )

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
        """See `task_passes.downstream_model`."""
        return task_passes.downstream_model(task, model, tokenizer)

    def task_losses(self, task: str, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Retrieval: `itc` and `itm`. Captioning, VQA: `lm`. NLVR2: `nlvr`.

        Raises:
            UnsupportedError: if the model is of another task.
            BatchError: if inputs are missing or do not fit each other.
        """
        check_task(task, model, kind_of(model))
        if task == Kind.RETRIEVAL:
            return task_passes.retrieval_losses(_xvlm(model), batch)
        return self.losses(model, batch)

    def load(self, source: str) -> nn.Module | None:
        """Loads what `save_pretrained` wrote, or an original `.pth` or `.safetensors` file.

        Finding out that it is neither is cheap and quiet.

        Raises:
            UnsupportedError: if it is X-VLM's, but damaged or incomplete.
        """
        path = Path(source)
        if (saved := load_saved(path, _SAVED, "X-VLM")) is not None:
            return saved
        if not is_original(tensor_names(path)):
            return None
        from vlp_adapters.xvlm.convert import load_original

        return load_original(path)

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

    def image_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, embed_dim]` from `pixel_values` or `image_embeds`."""
        require(model, MATCHING, "has no common space of images and texts")
        xvlm = _xvlm(model)
        return xvlm.project_image(image_embeds_of(xvlm, batch))

    def text_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, embed_dim]` from `input_ids` or `text_embeds`, and the mask."""
        require(model, MATCHING, "has no common space of images and texts")
        xvlm = _xvlm(model)
        return xvlm.project_text(text_embeds_of(xvlm, batch))

    def match(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B]` log-odds that image and text of each row belong together.

        Re-ranking scores the same image and text many times: a batch may have `image_embeds`
        (`[B, T, Dv]` of `encode_image`) instead of `pixel_values`, and `text_embeds` (`[B, L, D]`
        of `encode_text`) instead of `input_ids`. The attention mask is always needed.
        """
        require(model, MATCHING, "has no matching head")
        xvlm = _xvlm(model)
        (mask,) = need(batch, "attention_mask")
        logits = xvlm.match_logits(text_embeds_of(xvlm, batch), mask, image_embeds_of(xvlm, batch))
        return logits[:, 1] - logits[:, 0]

    def image_embeds(self, model: nn.Module, batch: Batch) -> Tensor:
        """Image tokens `[B, T, Dv]`."""
        return image_embeds_of(_xvlm(model), batch)

    def caption(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> Tensor:
        """`[B, L]` token ids; texts of the batch are not read.

        Raises:
            UnsupportedError: if the model is not the captioning model.
        """
        require(model, Kind.CAPTIONING, "writes no captions")
        (pixels,) = need(batch, "pixel_values")
        return cast("XvlmForCaptioning", model).generate(pixels, max_length, num_beams)

    def answer(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> Tensor:
        """`[B, A]` token ids of written answers.

        Raises:
            UnsupportedError: if the model is not the question answering model.
        """
        require(model, Kind.VQA, "answers no questions")
        return task_passes.write_answers(model, batch, max_length, num_beams)

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B]` log-odds that the statement of each row is true of its two images.

        Raises:
            UnsupportedError: if the model is not the one of NLVR2.
        """
        require(model, Kind.NLVR, "judges no statements about two images")
        return task_passes.judge(model, batch)

    def rank_answers(
        self,
        model: nn.Module,
        batch: Batch,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        candidates: int,
    ) -> Tensor:
        """`[B]` numbers of the most likely answers; see `rank_answers`.

        Raises:
            UnsupportedError: if the model is not the question answering model.
        """
        require(model, Kind.VQA, "answers no questions")
        return task_passes.choose_answers(model, batch, answer_ids, answer_mask, candidates)


def _kind(model: nn.Module) -> Kind:
    return cast("Kind", kind_of(model))


def _xvlm(model: nn.Module) -> XvlmForRetrieval:
    return cast("XvlmForRetrieval", model)
