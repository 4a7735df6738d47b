"""The prunable weights of X-VLM's downstream models, by names that pre-training masks have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from vlp_adapters.kinds import Kind, check_linear, is_as_wide
from vlp_adapters.names import BERT_PARTS, CROSS_INPUTS
from vlp_adapters.xvlm.weights import EXCLUSIONS, FUSION, TEXT, VISION, text_part, vision_part
from vlp_plugins.models.adapter import Exclusion, Owner, WeightSpec

ENCODER, DECODER, QUESTION = "encoder", "decoder", "question"
_SIDES = ("left", "right")

_DECODER_LAYER = re.compile(r"text_decoder\.bert\.encoder\.layer\.(\d+)\.(.+)")
_WORD_HEAD = Exclusion(r"^text_decoder\.cls\.", "word head: its matrix is the word embeddings")
_JUDGE = Exclusion(r"^cls_head\.", "head of the judgement: belongs to the task")
_NEW = Exclusion(
    r"^text_decoder\..*\.crossattention\.self\.(key|value)\.",
    "new in this model: reads text states, which are not as wide as image tokens",
)


def task_weight_specs(kind: Kind, model: Any) -> Iterator[WeightSpec]:
    """Every prunable weight in the order of the model's parameters.

    Captioning: `vision.{i}.*`, `text.{i}.*` and `fusion.{j}.*`, as in the pre-training model. VQA:
    these, and `decoder.{j}.*`, copies of `fusion.{j}.*`, whose cross-attention reads the question;
    its keys and values are left out if they could not be copied. NLVR2: instead of `fusion.{j}.*`
    its copies `left.{j}.*` and `right.{j}.*`, which attend to the left and to the right image; the
    keys and values of both are one weight, `left.{j}.cross.key`.

    Raises:
        UnsupportedError: if something else stands where a linear layer should be.
    """
    find = {Kind.CAPTIONING: _captioning, Kind.VQA: _answering, Kind.NLVR: _judging}[kind]
    for path, module in model.named_modules():
        spec = find(path, model)
        if spec is None:
            continue
        check_linear(path, module)
        yield spec


def task_exclusions(kind: Kind, model: Any) -> Iterable[Exclusion]:
    """What is not pruned."""
    if kind is Kind.NLVR:
        return (_JUDGE, *EXCLUSIONS)
    if kind is Kind.VQA and not is_as_wide(model):
        return (_WORD_HEAD, _NEW, *EXCLUSIONS)
    return (_WORD_HEAD, *EXCLUSIONS)


def _captioning(path: str, model: Any) -> WeightSpec | None:
    inner = path.replace("text_decoder.", "text_encoder.", 1)
    return _spec(path, vision_part(path, model.config) or text_part(inner, _fusion_layer(model)))


def _answering(path: str, model: Any) -> WeightSpec | None:
    match = _DECODER_LAYER.fullmatch(path)
    if match is None:
        found = vision_part(path, model.config) or text_part(path, _fusion_layer(model))
        return _spec(path, found)
    index, part = int(match[1]), BERT_PARTS.get(match[2])
    if part is None or (part in CROSS_INPUTS and not is_as_wide(model)):
        return None
    tokens = QUESTION if part in CROSS_INPUTS else TEXT
    copy_of = f"{FUSION}.{index}.{part}"
    return WeightSpec(f"{DECODER}.{index}.{part}", FUSION, index, (Owner(path, tokens),), copy_of)


def _judging(path: str, model: Any) -> WeightSpec | None:
    found = text_part(path, _fusion_layer(model))
    if found is None or found[0] != FUSION:
        return _spec(path, found or vision_part(path, model.config))
    _, index, part = found
    pair, side = divmod(index, 2)
    owners = [Owner(path, VISION if part in CROSS_INPUTS else TEXT)]
    if part in CROSS_INPUTS:
        if side:
            return None  # it is the left one's
        first = f".layer.{_fusion_layer(model) + index}."
        second = f".layer.{_fusion_layer(model) + index + 1}."
        owners.append(Owner(path.replace(first, second, 1), VISION))
    name = f"{_SIDES[side]}.{pair}.{part}"
    return WeightSpec(name, FUSION, index, tuple(owners), f"{FUSION}.{pair}.{part}")


def _spec(path: str, found: tuple[str, int, str] | None) -> WeightSpec | None:
    if found is None:
        return None
    modality, depth, part = found
    tokens = VISION if modality == VISION or part in CROSS_INPUTS else TEXT
    return WeightSpec(f"{modality}.{depth}.{part}", modality, depth, (Owner(path, tokens),))


def _fusion_layer(model: Any) -> int:
    return int(model.config.text_config.fusion_layer)
