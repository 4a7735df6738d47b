"""What X-VLM's models can be asked for: features, matching, captions, answers, judgements."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from vlp_adapters.kinds import Kind
from vlp_adapters.xvlm import task_passes
from vlp_adapters.xvlm.kinds import MATCHING, require
from vlp_adapters.xvlm.streams import image_embeds_of, text_embeds_of
from vlp_plugins.models.adapter import Batch, need

if TYPE_CHECKING:
    from vlp_adapters.xvlm.captioning import XvlmForCaptioning
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval


class XvlmAbilities:
    """The part of the adapter that evaluation asks; each ability belongs to one of the classes."""

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


def _xvlm(model: nn.Module) -> XvlmForRetrieval:
    return cast("XvlmForRetrieval", model)
