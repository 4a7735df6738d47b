"""The BLIP pre-training model: momentum contrast, matching and captioning losses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, BlipTextModel, BlipVisionModel
from transformers import initialization as init

from vlp_adapters.blip.configuration import BlipPretrainConfig
from vlp_adapters.blip.contrastive import (
    Similarities,
    contrastive_loss,
    enqueue,
    update_momentum,
)
from vlp_adapters.blip.forward import image_tokens, text_tokens
from vlp_adapters.blip.kinds import NEGATIVES_FLOOR, word_labels
from vlp_adapters.blip.towers import BlipTowers
from vlp_adapters.negatives import check_negatives, draw_negatives
from vlp_adapters.objectives import IGNORED, matching_loss, similarity
from vlp_adapters.pretraining import PretrainOutput, check_losses
from vlp_plugins.models.adapter import Negatives

LOSSES = ("itc", "itm", "lm")
_COLDEST, _HOTTEST = 0.001, 0.5  # bounds of the learned temperature


class BlipForPretraining(BlipTowers):
    """The towers with momentum twins, queues of features, and the pre-training losses.

    In a distributed run every process has a queue of its own pairs.
    """

    def __init__(self, config: BlipPretrainConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.vision_model_m = BlipVisionModel(vision)
        self.text_encoder_m = BlipTextModel(text, add_pooling_layer=False)
        self.vision_proj_m = nn.Linear(vision.hidden_size, config.embed_dim)
        self.text_proj_m = nn.Linear(text.hidden_size, config.embed_dim)
        self.register_buffer("image_queue", torch.zeros(config.embed_dim, config.queue_size))
        self.register_buffer("text_queue", torch.zeros(config.embed_dim, config.queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.post_init()

    def momentum_pairs(self, *, projections: bool = True) -> list[tuple[nn.Module, nn.Module]]:
        """Every network of the contrastive loss with its momentum twin.

        Args:
            projections: those of the projections, too.
        """
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.vision_model, self.vision_model_m),
            (self.text_encoder, self.text_encoder_m),
            (self.vision_proj, self.vision_proj_m),
            (self.text_proj, self.text_proj_m),
        ]
        return pairs if projections else pairs[:2]

    def contrast_state(self) -> list[Tensor]:
        """What a forward with `update_state` changes: queues, temperature, momentum twins."""
        twins = [slow for _, twin in self.momentum_pairs() for slow in twin.parameters()]
        return [self.image_queue, self.text_queue, self.queue_ptr, self.temp, *twins]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is not self:
            return
        init.constant_(self.temp, self.config.temperature)
        for online, twin in self.momentum_pairs():
            for slow, fast in zip(twin.parameters(), online.parameters(), strict=True):
                init.copy_(slow, fast)
        for queue in (self.image_queue, self.text_queue):
            init.copy_(queue, functional.normalize(torch.randn_like(queue), dim=0))
        init.zeros_(self.queue_ptr)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Ties the shared parameters and freezes the twins: loading thaws what it replaces."""
        super().tie_weights(*args, **kwargs)
        for _, twin in self.momentum_pairs():
            twin.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        negatives: Negatives | None = None,
        update_state: bool = True,
        losses: Collection[str] = LOSSES,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
        update_projections: bool = True,
    ) -> PretrainOutput:
        """The pre-training losses of a batch of matching pairs.

        The contrastive part, which runs for `itc` and to draw negatives, changes state, in
        evaluation mode too: momentum twins and temperature bounds before, the queues after.

        Args:
            pixel_values: `[B, 3, H, W]`.
            input_ids: `[B, L]` int64, right-padded, the first token is [CLS].
            attention_mask: `[B, L]`, 1 for real tokens.
            negatives: hard negatives of the first `N` pairs to use; drawn by similarity if None.
            update_state: False leaves momentum twins, temperature and queues as they are.
            losses: which of `itc`, `itm`, `lm` to compute.
            alpha: share of soft targets; None for the configuration's.
            generator: CPU generator of the draws; None for the global one.
            update_projections: False leaves the momentum twins of the projections as they are.

        Raises:
            ValueError: if a loss is unknown, or `negatives` do not fit.
        """
        check_losses(losses, LOSSES)
        matching = "itm" in losses
        if matching and negatives is not None:
            check_negatives(negatives, len(input_ids))
        terms: dict[str, Tensor] = {}
        image_embeds = self.encode_image(pixel_values)
        if "itc" in losses or (matching and negatives is None):
            if update_state:
                self._update_twins(update_projections)
            similarities = self._compare(
                image_embeds, pixel_values, input_ids, attention_mask, update_state
            )
            if "itc" in losses:
                share = self.config.alpha if alpha is None else alpha
                terms["itc"] = contrastive_loss(similarities, share)
            if matching and negatives is None:
                rows = len(input_ids)
                negatives = draw_negatives(
                    similarities.image_to_text[:, :rows],
                    similarities.text_to_image[:, :rows],
                    floor=NEGATIVES_FLOOR,
                    generator=generator,
                )
        if matching and negatives is not None:
            terms["itm"] = matching_loss(
                self.match_logits, input_ids, attention_mask, image_embeds, negatives
            )
        if "lm" in losses:
            terms["lm"] = self._caption_loss(input_ids, attention_mask, image_embeds)
        return PretrainOutput.of(terms, negatives if matching else None)

    @torch.no_grad()
    def advance(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        update_projections: bool = True,
    ) -> None:
        """Changes state as `forward` of this batch does, without any loss; same arguments."""
        self._update_twins(update_projections)
        features = self._momentum_features(pixel_values, input_ids, attention_mask)
        self._enqueue(*features)

    @torch.no_grad()
    def _update_twins(self, projections: bool) -> None:
        # `.data`: a graph of an earlier batch that still waits for its backward stays valid.
        self.temp.data.clamp_(_COLDEST, _HOTTEST)
        for online, twin in self.momentum_pairs(projections=projections):
            update_momentum(online, twin, self.config.momentum)

    def _momentum_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L2-normalised `[B, D]` features of images and texts by the momentum twins."""
        tokens = image_tokens(self.vision_model_m, pixel_values)
        image = functional.normalize(self.vision_proj_m(tokens[:, 0]), dim=-1)
        tokens = text_tokens(self.text_encoder_m, input_ids, attention_mask)
        return image, functional.normalize(self.text_proj_m(tokens[:, 0]), dim=-1)

    def _enqueue(self, image: Tensor, text: Tensor) -> None:
        enqueue(self.image_queue, self.queue_ptr, image)
        enqueue(self.text_queue, self.queue_ptr, text)
        self.queue_ptr.add_(len(image)).remainder_(self.config.queue_size)

    def _compare(
        self,
        image_embeds: Tensor,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        update_state: bool,
    ) -> Similarities:
        """Compares the batch with its momentum features and the queues."""
        image = self.project_image(image_embeds)
        text = self.get_text_features(input_ids, attention_mask)
        with torch.no_grad():
            image_m, text_m = self._momentum_features(pixel_values, input_ids, attention_mask)
            images = torch.cat([image_m.T.to(self.image_queue.device), self.image_queue], dim=1)
            texts = torch.cat([text_m.T.to(self.text_queue.device), self.text_queue], dim=1)
            by_image_m = similarity(image_m, texts, self.temp)
            by_text_m = similarity(text_m, images, self.temp)
            if update_state:
                self._enqueue(image_m, text_m)
        return Similarities(
            image_to_text=similarity(image, texts, self.temp),
            text_to_image=similarity(text, images, self.temp),
            image_to_text_m=by_image_m,
            text_to_image_m=by_text_m,
        )

    def _caption_loss(self, input_ids: Tensor, attention_mask: Tensor, image: Tensor) -> Tensor:
        """Cross-entropy of every real token but the first, given those before it and the image."""
        text: Any = self.config.text_config
        target = word_labels(input_ids, attention_mask, text.pad_token_id)[:, 1:]
        logits = self.decode(input_ids, attention_mask, image)[:, :-1]
        total = functional.cross_entropy(
            logits.flatten(0, 1),
            target.flatten(),
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )
        words = (target != IGNORED).sum()
        return total / words.clamp(min=1)  # 0, not NaN, where no word is left


AutoModel.register(BlipPretrainConfig, BlipForPretraining, exist_ok=True)
