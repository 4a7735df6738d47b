"""BLIP as pruning sees it: two modalities, text towers that share weights, seven classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from vlp_adapters.blip import forward
from vlp_adapters.blip.kinds import Kind, kind_of
from vlp_adapters.blip.losses import advance, training_losses
from vlp_adapters.blip.names import is_original, to_original_name
from vlp_adapters.blip.streams import activation_streams
from vlp_adapters.blip.weights import EXCLUSIONS, downstream_paths, weight_specs
from vlp_adapters.checkpoints import from_folder, is_saved_as, tensor_names
from vlp_plugins.adapter import Adapter, Batch, Exclusion, Negatives, Stream, WeightSpec, need

if TYPE_CHECKING:
    from vlp_adapters.blip.modeling import BlipForPretraining

_MODEL_TYPE = "vlp_blip_pretrain"
_IN_ORIGINAL = re.compile(
    r"(vision_model|text_encoder|vision_proj|text_proj)(_m)?\.|(text_decoder|itm_head)\.|temp$"
)


class BlipAdapter(Adapter):
    """`BlipForPretraining`, and of transformers the retrieval, captioning and VQA classes.

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
        return EXCLUSIONS

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
        answers (`labels`). `BlipModel`: `itc`. Negatives that are not given are drawn by
        similarity; the draw depends on the batch and the model only, never on the global random
        state.

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

    def for_task(self, task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Paths in transformers' downstream classes; see `downstream_paths`."""
        return downstream_paths(task, model)

    def load(self, source: str) -> nn.Module | None:
        """Loads what `save_pretrained` wrote, or an original `.pth` or `.safetensors` file.

        Finding out that it is neither is cheap and quiet; folders of transformers' own classes are
        not loaded here.

        Raises:
            UnsupportedError: if it is BLIP's, but damaged, incomplete or of another task.
        """
        path = Path(source)
        if is_saved_as(path, _MODEL_TYPE):
            from vlp_adapters.blip.modeling import BlipForPretraining

            return from_folder(BlipForPretraining, path, "BLIP")
        if not is_original(tensor_names(path)):
            return None
        from vlp_adapters.blip.convert import load_original

        return load_original(path)

    def original_name(self, path: str) -> str | None:
        """The name that the BLIP code base gives to parameter `path`.

        None for what only `BlipModel` has, and for a tower on its own.
        """
        return to_original_name(path) if _IN_ORIGINAL.match(path) else None

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

    def caption(self, model: nn.Module, batch: Batch, *, max_length: int) -> Tensor:
        """`[B, L]` token ids, greedy; texts of the batch are not read."""
        return forward.write_captions(model, batch, max_length)


def _kind(model: nn.Module) -> Kind:
    return cast("Kind", kind_of(model))
