"""From X-VLM's pre-training model to the models that are fine-tuned, and the loss of retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlp_adapters.kinds import Kind, is_of_task
from vlp_adapters.objectives import losses_of_pairs
from vlp_adapters.xvlm.kinds import kind_of
from vlp_adapters.xvlm.streams import matching_pairs
from vlp_plugins.models.adapter import Batch, Negatives
from vlp_plugins.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval


def downstream_model(task: str, model: Any, tokenizer: Any | None) -> nn.Module:
    """The model of a task with the weights of the pre-training model.

    - `retrieval`: the pre-training model itself.
    - `nlvr2`: `XvlmForNlvr`, which has each fusion layer twice, and a new head.
    - `captioning`: `XvlmForCaptioning`, whose decoder is made of text and fusion layers.
    - `vqa`: `XvlmForQuestionAnswering`, whose decoder is a copy of the fusion layers.

    Args:
        task: one of these.
        model: of pre-training, or of the task already.
        tokenizer: its [CLS] and [SEP] begin and end what the decoder writes; None takes BERT's.

    Raises:
        UnsupportedError: if the task is unknown, the model is of another one, or [CLS] and [SEP]
            are not in its vocabulary.
    """
    if is_of_task(task, model, kind_of(model), "X-VLM"):
        whole: nn.Module = model
        return whole
    from vlp_adapters.xvlm.answering import XvlmForQuestionAnswering
    from vlp_adapters.xvlm.captioning import XvlmForCaptioning
    from vlp_adapters.xvlm.nlvr import XvlmForNlvr

    if task == Kind.NLVR:
        return XvlmForNlvr.from_pretraining(model).train(model.training)
    made: Any = XvlmForCaptioning if task == Kind.CAPTIONING else XvlmForQuestionAnswering
    try:
        there: nn.Module = made.from_pretraining(model, **_ends(tokenizer))
    except ValueError as error:
        raise UnsupportedError(f"{error}, or the tokenizer itself") from error
    return there.train(model.training)


def retrieval_losses(
    model: XvlmForRetrieval, batch: Batch, negatives: Negatives | None = None
) -> dict[str, Tensor]:
    """`itc` and `itm`, without masked words; negatives are drawn if None.

    Raises:
        BatchError: if inputs are missing or do not fit each other.
    """
    pairs = matching_pairs(model, batch)
    return losses_of_pairs(model, pairs, negatives=negatives, losses=("itc", "itm"))


def _ends(tokenizer: Any | None) -> dict[str, int]:
    """Options of a downstream model: the tokens that a tokenizer begins and ends texts with."""
    found = {
        "start_token_id": getattr(tokenizer, "cls_token_id", None),
        "end_token_id": getattr(tokenizer, "sep_token_id", None),
    }
    return {name: token for name, token in found.items() if token is not None}
