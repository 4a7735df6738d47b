"""X-VLM as pruning sees it: three modalities, three streams, three losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from vlp_adapters.checkpoints import from_folder, is_saved_as, tensor_names
from vlp_adapters.inputs import need_partners
from vlp_adapters.negatives import generator_of
from vlp_adapters.xvlm.masking import mask_words, word_targets
from vlp_adapters.xvlm.names import is_original, to_original_name
from vlp_adapters.xvlm.streams import (
    activation_streams,
    image_embeds_of,
    matching_pairs,
    text_embeds_of,
)
from vlp_adapters.xvlm.weights import EXCLUSIONS, downstream_paths, weight_specs
from vlp_plugins.adapter import Adapter, Batch, Exclusion, Negatives, Stream, WeightSpec, need

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlp_adapters.xvlm.modeling import XvlmForPretraining

_MODEL_TYPE = "vlp_xvlm_pretrain"
_INPUTS = ("pixel_values", "input_ids", "attention_mask")
# Compared as text, so that asking about another model does not import transformers.
_CLASS = "vlp_adapters.xvlm.modeling.XvlmForPretraining"


class XvlmAdapter(Adapter):
    """`XvlmForPretraining`: vision encoder, text layers, fusion layers.

    Canonical names are `vision.{i}.attention.query`, `text.{i}.self.query`,
    `fusion.{j}.cross.query`, `fusion.{j}.ffn.fc1`; see `weight_specs` for the numbers.
    """

    name = "xvlm"

    def claims(self, model: nn.Module) -> bool:
        """True for `XvlmForPretraining` and what is derived from it."""
        return any(f"{c.__module__}.{c.__qualname__}" == _CLASS for c in type(model).__mro__)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """All linear layers of the three towers; nothing is shared among them."""
        return weight_specs(_xvlm(model))

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        """Projections, heads, embeddings and vectors."""
        return EXCLUSIONS

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        """`vision`, `text` and `fusion`, to be run in this order; see `activation_streams`."""
        return activation_streams(_xvlm(model), batch, published=published)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """`itc` contrastive, `itm` matching, `mlm` masked words.

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
        xvlm = _xvlm(model)
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
        """Paths in the original code base's models; see `downstream_paths`."""
        return downstream_paths(task, _xvlm(model))

    def load(self, source: str) -> nn.Module | None:
        """Loads what `save_pretrained` wrote, or an original `.pth` or `.safetensors` file.

        Finding out that it is neither is cheap and quiet.

        Raises:
            UnsupportedError: if it is X-VLM's, but damaged or incomplete.
        """
        path = Path(source)
        if is_saved_as(path, _MODEL_TYPE):
            from vlp_adapters.xvlm.modeling import XvlmForPretraining

            return from_folder(XvlmForPretraining, path, "X-VLM")
        if not is_original(tensor_names(path)):
            return None
        from vlp_adapters.xvlm.convert import load_original

        return load_original(path)

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

    def image_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, embed_dim]` from `pixel_values` or `image_embeds`."""
        xvlm = _xvlm(model)
        return xvlm.project_image(image_embeds_of(xvlm, batch))

    def text_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """L2-normalised `[B, embed_dim]` from `input_ids` or `text_embeds`, and the mask."""
        xvlm = _xvlm(model)
        return xvlm.project_text(text_embeds_of(xvlm, batch))

    def match(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[B]` log-odds that image and text of each row belong together.

        Re-ranking scores the same image and text many times: a batch may have `image_embeds`
        (`[B, T, Dv]` of `encode_image`) instead of `pixel_values`, and `text_embeds` (`[B, L, D]`
        of `encode_text`) instead of `input_ids`. The attention mask is always needed.
        """
        xvlm = _xvlm(model)
        (mask,) = need(batch, "attention_mask")
        logits = xvlm.match_logits(text_embeds_of(xvlm, batch), mask, image_embeds_of(xvlm, batch))
        return logits[:, 1] - logits[:, 0]


def _xvlm(model: nn.Module) -> XvlmForPretraining:
    return cast("XvlmForPretraining", model)
