"""BLIP as pruning sees it: two modalities, text towers that share weights, eight classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from vlp_adapters.blip import answering, downstream, forward
from vlp_adapters.blip.kinds import kind_of
from vlp_adapters.blip.losses import advance, training_losses
from vlp_adapters.blip.names import is_original, task_of, to_original_name
from vlp_adapters.blip.streams import activation_streams
from vlp_adapters.blip.weights import downstream_paths, exclusions, weight_specs
from vlp_adapters.checkpoints import load_saved, tensor_names
from vlp_adapters.kinds import Kind
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
    from vlp_adapters.blip.modeling import BlipForPretraining

_SAVED = {  # model type of a configuration -> class
    "vlp_blip_pretrain": "blip.modeling.BlipForPretraining",
    "vlp_blip_answering": "blip.answering_model.BlipForAnswering",
    "vlp_blip_nlvr2": "blip.nlvr_model.BlipForNlvr",
}
_DESCRIPTIONS = {
    Kind.PRETRAINING: "original BLIP checkpoint of pre-training",
    Kind.RETRIEVAL: "original BLIP checkpoint of image-text retrieval",
    Kind.CAPTIONING: "original BLIP checkpoint of captioning",
    Kind.VQA: "original BLIP checkpoint of visual question answering",
    Kind.NLVR: "original BLIP checkpoint of NLVR2, statements about two images",
    None: "original BLIP checkpoint of towers without the heads of a task",
}
_IN_ORIGINAL = re.compile(
    r"(vision_model|text_encoder|vision_proj|text_proj)(_m)?\.|(text_decoder|itm_head|cls_head)\."
    r"|temp$"
)
_SPLIT = re.compile(r"\.self_attn\.([qkv])_proj\.")


class BlipAdapter(Adapter):
    """`BlipForPretraining`, `BlipForNlvr`, and transformers' retrieval, captioning, VQA classes.

    Also `BlipModel` (two towers; its cross-attention is not pruned, because its forward never runs
    it), `BlipVisionModel` and `BlipTextModel`. Canonical names are `vision.{i}.attention.qkv`,
    `text.{i}.cross.query`, `decoder.{i}.self.query`; see `weight_specs`.
    """

    name = "blip"

    def claims(self, model: nn.Module) -> bool:
        """True for these classes and what is derived from them."""
        return kind_of(model) is not None

    def weights(self, model: nn.Module) -> Iterable[WeightSpec]:
        """All linear layers of the towers; what encoder and decoder share has two owners."""
        return weight_specs(model)

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Momentum copies, projections, heads, embeddings and vectors."""
        return exclusions(model)

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """`vision`, `encoder` and `decoder`, as far as the class has them, to be run in this order.

        Queues and momentum copies stay as they are. See `activation_streams`.
        """
        return activation_streams(_kind(model), model, batch, published=published)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
        update_state: bool = True,
    ) -> dict[str, Tensor]:
        """`itc` contrastive, `itm` matching, `lm` words: those that the class has heads for.

        Pre-training model: all three. Retrieval: `itc` within the batch at temperature 0.07, and
        `itm`. Captioning: `lm` of the captions (`labels`, else `input_ids`). VQA: `lm` of the
        answers (`labels`). NLVR2: `nlvr` (`labels`). `BlipModel`: `itc`. Negatives that are not
        given are drawn by similarity; the draw depends on the batch and the model only, never on
        the global random state.

        Args:
            model: a model that this adapter claims.
            batch: `B` matching pairs, at least two where there is `itm`.
            negatives: for every text a wrong image, for every image a wrong text; only `itm`
                reads them.
            published: leave the momentum copies of the projections as they are, as happens inside
                the published pruners, which hold on to projections that they have replaced.
            update_state: whether queues, momentum copies and bounds of the temperature of the
                pre-training model advance as in training, in evaluation mode too. Published
                gradients are those of batches in order with this on.

        Raises:
            BatchError: if inputs are missing or do not fit each other.
            UnsupportedError: if the model is one tower, without any loss.
        """
        return training_losses(
            _kind(model),
            model,
            batch,
            negatives,
            update_state=update_state,
            update_projections=not published,
        )

    def loss_state(self, model: nn.Module) -> list[Tensor]:
        """Of the pre-training model: queues, their pointer, temperature, momentum copies."""
        if _kind(model) is not Kind.PRETRAINING:
            return []
        return cast("BlipForPretraining", model).contrast_state()

    def advance(self, model: nn.Module, batch: Batch, *, published: bool = False) -> None:
        """A momentum step, and the momentum features of the batch into the queues.

        About an eighth of the time that `losses` and their backward take.

        Raises:
            BatchError: if inputs are missing or do not fit each other.
        """
        if _kind(model) is Kind.PRETRAINING:
            advance(model, batch, update_projections=not published)

    def split_fused(self, model: nn.Module) -> None:
        """Splits `qkv` of every vision encoder, momentum copies included; see `SplitAttention`."""
        from vlp_adapters.blip.split_attention import split_attentions

        split_attentions(model)

    def followers(self, model: nn.Module) -> dict[str, str]:
        """Of the pre-training model the towers that have momentum copies."""
        if _kind(model) is not Kind.PRETRAINING:
            return {}
        return {tower: f"{tower}_m" for tower in ("vision_model", "text_encoder")}

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Paths in transformers' downstream classes; see `downstream_paths`."""
        return downstream_paths(task, model)

    def downstream_model(
        self,
        task: str,
        model: nn.Module,
        *,
        tokenizer: Any | None = None,
        classes: int | None = None,
    ) -> nn.Module:
        """See `downstream.downstream_model`; the configuration knows how texts begin and end."""
        return downstream.downstream_model(task, model)

    def task_losses(self, task: str, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Retrieval: `itc` and `itm`. Captioning, VQA: `lm`. NLVR2: `nlvr`.

        Raises:
            UnsupportedError: if the model is of another task.
            BatchError: if inputs are missing or do not fit each other.
        """
        found = downstream.task_losses(task, model, batch)
        return self.losses(model, batch) if found is None else found

    def load(self, source: str) -> nn.Module | None:
        """Loads what `save_pretrained` wrote, or an original `.pth` or `.safetensors` file.

        Finding out that it is neither is cheap and quiet; folders of transformers' own classes are
        not loaded here.

        Raises:
            UnsupportedError: if it is BLIP's, but damaged or incomplete, or its number of heads
                cannot be guessed.
        """
        path = Path(source)
        if (saved := load_saved(path, _SAVED, "BLIP")) is not None:
            return saved
        if not is_original(tensor_names(path)):
            return None
        from vlp_adapters.blip.convert import load_original

        model: nn.Module = load_original(path)
        return model

    def describe(self, source: str) -> str | None:
        """What an original file is for, by the names of its tensors."""
        names = tensor_names(Path(source))
        if not is_original(names):
            return None
        kind = task_of(names)
        has_copies = kind is Kind.RETRIEVAL and any("_m." in name for name in names)
        copies = " (not loaded: momentum copies and queues)" if has_copies else ""
        return f"{_DESCRIPTIONS[kind]}{copies}"

    def original_name(self, path: str) -> str | None:
        """The name that the BLIP code base gives to parameter `path`.

        None for what only `BlipModel` has, for a tower on its own, and for query, key and value of
        a split attention, which are one tensor there.
        """
        if not _IN_ORIGINAL.match(path) or _SPLIT.search(path):
            return None
        return to_original_name(path)

    def original_part(self, path: str) -> OriginalPart | None:
        """A third of `attn.qkv` for query, key and value of a split attention."""
        if not (match := _SPLIT.search(path)):
            return super().original_part(path)
        fused = self.original_name(path.replace(match[0], ".self_attn.qkv."))
        return None if fused is None else OriginalPart(fused, "qkv".index(match[1]), 3)

    def image_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, D]` from `pixel_values` or `image_embeds`."""
        return forward.image_features(model, forward.image_embeds_of(model, batch))

    def text_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, D]` from `input_ids` and `attention_mask`."""
        ids, mask = need(batch, "input_ids", "attention_mask")
        return forward.text_features(model, ids, mask)

    def match(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B]` log-odds that image and text of each row belong together.

        Re-ranking scores the same image many times: a batch may have `image_embeds`
        (`[B, T, Dv]`, tokens of the vision encoder) instead of `pixel_values`.
        """
        ids, mask = need(batch, "input_ids", "attention_mask")
        logits = forward.match_logits(model, ids, mask, forward.image_embeds_of(model, batch))
        return logits[:, 1] - logits[:, 0]

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B]` log-odds that the statement of each row is true of its two images."""
        logits = forward.judge_logits(model, batch)
        return logits[:, 1] - logits[:, 0]

    def image_embeds(self, model: nn.Module, batch: Batch) -> Tensor:
        """Image tokens `[B, T, Dv]`."""
        return forward.image_embeds_of(model, batch)

    def caption(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> Tensor:
        """`[B, L]` token ids; texts of the batch are not read."""
        return forward.write_captions(model, batch, max_length, num_beams)

    def answer(
        self, model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1
    ) -> Tensor:
        """`[B, A]` token ids of written answers."""
        return answering.write_answers(model, batch, max_length, num_beams)

    def rank_answers(
        self,
        model: nn.Module,
        batch: Batch,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        candidates: int,
    ) -> Tensor:
        """`[B]` numbers of the most likely answers; see `choose_answers`."""
        return answering.choose_answers(model, batch, answer_ids, answer_mask, candidates)


def _kind(model: nn.Module) -> Kind:
    return cast("Kind", kind_of(model))
