"""Where the weights of the BLIP pre-training model go in transformers' downstream classes."""

from __future__ import annotations

from torch import nn

from vlp_adapters.blip.kinds import Kind, kind_of
from vlp_adapters.blip.layers import weight_specs
from vlp_plugins.errors import UnsupportedError

_TOWERS = {  # task -> the towers of the pre-training model that its class has, by the same path
    "pretraining": ("vision_model.", "text_encoder.", "text_decoder."),
    "retrieval": ("vision_model.", "text_encoder."),
    "captioning": ("vision_model.", "text_decoder."),
    "vqa": ("vision_model.", "text_encoder.", "text_decoder."),
}


def downstream_paths(task: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """By canonical name the parameter paths in the model of `task`.

    - `pretraining`: this model; what encoder and decoder share has both paths.
    - `retrieval`: `BlipForImageTextRetrieval`, the vision and the text encoder.
    - `captioning`: `BlipForConditionalGeneration`, the vision encoder and the text decoder; the
      self-attention of the text encoder maps to `()`.
    - `vqa`: `BlipForQuestionAnswering`; what encoder and decoder shared is copied into both.

    Args:
        task: one of these.
        model: the pre-training model; for `pretraining` any claimed model, whose own paths those
            are.

    Raises:
        UnsupportedError: if the task is unknown, or the model is a downstream one already.
    """
    if task not in _TOWERS:
        raise UnsupportedError(
            f"BLIP knows no downstream task {task!r}; it knows: {', '.join(_TOWERS)}"
        )
    specs = weight_specs(model)
    if task == Kind.PRETRAINING:
        return {spec.name: tuple(owner.path for owner in spec.owners) for spec in specs}
    if kind_of(model) is not Kind.PRETRAINING:
        raise UnsupportedError(
            f"{type(model).__name__} is no pre-training model, so its weights do not go to the "
            f"{task} model; give BlipForPretraining"
        )
    return {
        spec.name: tuple(o.path for o in spec.owners if o.path.startswith(_TOWERS[task]))
        for spec in specs
    }
