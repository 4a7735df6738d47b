"""What every adapter has to keep, checked on a tiny model of each kind it claims."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vlp_adapters.blip import BlipForNlvr, BlipForPretraining, BlipPretrainConfig
from vlp_adapters.blip.nlvr_model import BlipNlvrConfig
from vlp_adapters.clip.modeling import SiglipWithClipVision, SiglipWithClipVisionConfig
from vlp_adapters.plugin import vlp_adapters
from vlp_adapters.xvlm import (
    XvlmForCaptioning,
    XvlmForNlvr,
    XvlmForPretraining,
    XvlmForQuestionAnswering,
    XvlmForRetrieval,
    XvlmPretrainConfig,
    XvlmRetrievalConfig,
)
from vlp_plugins.calibration.tokens import real_of
from vlp_plugins.models.adapter import Adapter, Owner
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.restricted import DelegatingAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SIZES, "intermediate_size": 32, "vocab_size": 50}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
SIGLIP_TEXT: dict[str, Any] = {
    **TEXT,
    "max_position_embeddings": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FEW: dict[str, Any] = {"intermediate_size": 32, "num_register_tokens": 2}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(2, 3, 16, 16)}


def texts() -> dict[str, Tensor]:
    """Two texts of 6 and 3 tokens, padded to 6; the number of image tokens is 5."""
    ids = torch.tensor([[1, 7, 8, 9, 10, 2], [1, 7, 2, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pairs() -> dict[str, Tensor]:
    return images() | texts()


def answered() -> dict[str, Tensor]:
    """Questions with answers of 3 and 4 tokens."""
    return pairs() | {"labels": torch.tensor([[1, 9, 2, 0], [1, 7, 9, 2]])}


def statements() -> dict[str, Tensor]:
    """About two images each."""
    return texts() | {"pixel_values": torch.rand(2, 2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def labelled() -> dict[str, Tensor]:
    """The texts, with what a head over the vocabulary shall say."""
    return texts() | {"labels": texts()["input_ids"]}


def unmasked() -> dict[str, Tensor]:
    """Texts of 16 tokens without a mask, as SigLIP was trained."""
    return {"input_ids": torch.randint(2, 50, (2, 16))}


def unmasked_pairs() -> dict[str, Tensor]:
    return images() | unmasked()


def patches() -> dict[str, Tensor]:
    """Two images of 4 and 2 patches of 8 x 8 pixels, padded to 4, as SigLIP 2 reads them."""
    return {
        "pixel_values": torch.rand(2, 4, 3 * 8 * 8),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "spatial_shapes": torch.tensor([[2, 2], [1, 2]]),
    }


def conv_net() -> nn.Module:
    first, last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), *pool, last)


def vit_config() -> ViTConfig:
    return ViTConfig(**IMAGE, intermediate_size=32)


def clip_config() -> CLIPConfig:
    vision = {**IMAGE, "intermediate_size": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CLIPConfig(text_config=TEXT | special, vision_config=vision, projection_dim=8)


def ending_clip_config() -> CLIPConfig:
    """As `clip_config`, and texts end with 11: 2 would stand for the highest id of a text."""
    config = clip_config()
    config.text_config.eos_token_id = 11
    return config


def ended() -> dict[str, Tensor]:
    """The texts with 11 at their end."""
    ids = texts()["input_ids"]
    return texts() | {"input_ids": ids.masked_fill(ids == 2, 11)}


def ended_pairs() -> dict[str, Tensor]:
    return images() | ended()


def siglip_config() -> SiglipConfig:
    vision = {**IMAGE, "intermediate_size": 32}
    return SiglipConfig(text_config=SIGLIP_TEXT, vision_config=vision)


def siglip_clip_config() -> SiglipWithClipVisionConfig:
    vision = {**IMAGE, "intermediate_size": 32, "projection_dim": 16}
    return SiglipWithClipVisionConfig(text_config=SIGLIP_TEXT, vision_config=vision)


def siglip2_config() -> Siglip2Config:
    vision = {**SIZES, "intermediate_size": 32, "patch_size": 8, "num_patches": 4}
    return Siglip2Config(text_config=SIGLIP_TEXT, vision_config=vision)


def blip_vision() -> BlipVisionConfig:
    return BlipVisionConfig(**IMAGE, intermediate_size=32, initializer_range=0.02)


def blip_text() -> BlipTextConfig:
    return BlipTextConfig(**TEXT, bos_token_id=48, sep_token_id=2, max_position_embeddings=16)


def blip() -> nn.Module:
    towers = {"vision_config": blip_vision(), "text_config": blip_text()}
    sizes = {"embed_dim": 8, "queue_size": 4, "dec_token_id": 48, "enc_token_id": 49}
    return BlipForPretraining(BlipPretrainConfig(**towers, **sizes))


def blip_config() -> BlipConfig:
    sizes = {"projection_dim": 8, "image_text_hidden_size": 8}
    return BlipConfig(vision_config=blip_vision(), text_config=blip_text(), **sizes)


def blip_nlvr() -> nn.Module:
    sizes = blip_config().to_dict() | {"merged_from": 1}
    return BlipForNlvr(BlipNlvrConfig(**sizes))


def xvlm_towers(vision: Any = None) -> dict[str, Any]:
    text = BertConfig(**TEXT, max_position_embeddings=16, fusion_layer=1)
    vision = vision or CLIPVisionConfig(**IMAGE, intermediate_size=32)
    return {"vision_config": vision, "text_config": text}


def xvlm(vision: Any = None) -> XvlmForPretraining:
    return XvlmForPretraining(XvlmPretrainConfig(**xvlm_towers(vision), embed_dim=8))


ENDS = {"start_token_id": 1, "end_token_id": 2}


@dataclass(frozen=True)
class Row:
    """A tiny model, a batch for it, and the adapter under test (`module`: any model)."""

    adapter: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]


ROWS = {
    "blip": Row("blip", blip, pairs),
    "blip-retrieval": Row("blip", lambda: BlipForImageTextRetrieval(blip_config()), pairs),
    "blip-captioning": Row("blip", lambda: BlipForConditionalGeneration(blip_config()), pairs),
    "blip-vqa": Row("blip", lambda: BlipForQuestionAnswering(blip_config()), answered),
    "blip-nlvr": Row("blip", blip_nlvr, statements),
    "blip-dual": Row("blip", lambda: BlipModel(blip_config()), pairs),
    "blip-vision": Row("blip", lambda: BlipVisionModel(blip_vision()), images),
    "blip-text": Row("blip", lambda: BlipTextModel(blip_text()), texts),
    "vit": Row("vit", lambda: ViTForImageClassification(vit_config()), images),
    "vit-bare": Row("vit", lambda: ViTModel(vit_config()), images),
    "dinov2": Row("vit", lambda: Dinov2Model(Dinov2Config(**IMAGE, mlp_ratio=2)), images),
    "dinov2-swiglu": Row(
        "vit",
        lambda: Dinov2ForImageClassification(
            Dinov2Config(**IMAGE, mlp_ratio=2, use_swiglu_ffn=True)
        ),
        images,
    ),
    "dinov2-registers": Row(
        "vit",
        lambda: Dinov2WithRegistersForImageClassification(
            Dinov2WithRegistersConfig(**IMAGE, mlp_ratio=2, num_register_tokens=3)
        ),
        images,
    ),
    "dinov2-registers-swiglu": Row(
        "vit",
        lambda: Dinov2WithRegistersForImageClassification(
            Dinov2WithRegistersConfig(**IMAGE, mlp_ratio=2, use_swiglu_ffn=True)
        ),
        images,
    ),
    "dinov3": Row("vit", lambda: DINOv3ViTModel(DINOv3ViTConfig(**IMAGE, **FEW)), images),
    "dinov3-gated": Row(
        "vit",
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**IMAGE, **FEW, use_gated_mlp=True)),
        images,
    ),
    "xvlm": Row("xvlm", xvlm, pairs),
    "xvlm-deit": Row("xvlm", lambda: xvlm(ViTConfig(**IMAGE, intermediate_size=32)), pairs),
    "xvlm-retrieval": Row(
        "xvlm", lambda: XvlmForRetrieval(XvlmRetrievalConfig(**xvlm_towers(), embed_dim=8)), pairs
    ),
    "xvlm-nlvr2": Row("xvlm", lambda: XvlmForNlvr.from_pretraining(xvlm()), statements),
    "xvlm-captioning": Row(
        "xvlm", lambda: XvlmForCaptioning.from_pretraining(xvlm(), **ENDS), pairs
    ),
    "xvlm-vqa": Row(
        "xvlm", lambda: XvlmForQuestionAnswering.from_pretraining(xvlm(), **ENDS), answered
    ),
    "clip": Row("clip", lambda: CLIPModel(ending_clip_config()), ended_pairs),
    "clip-vision": Row("clip", lambda: CLIPVisionModel(clip_config().vision_config), images),
    "clip-vision-projected": Row(
        "clip", lambda: CLIPVisionModelWithProjection(clip_config().vision_config), images
    ),
    "clip-text": Row("clip", lambda: CLIPTextModel(ending_clip_config().text_config), ended),
    "clip-text-projected": Row(
        "clip", lambda: CLIPTextModelWithProjection(ending_clip_config().text_config), ended
    ),
    "clip-classifier": Row("clip", lambda: CLIPForImageClassification(clip_config()), images),
    "siglip": Row("siglip", lambda: SiglipModel(siglip_config()), unmasked_pairs),
    "siglip-clip-vision": Row(
        "siglip", lambda: SiglipWithClipVision(siglip_clip_config()), unmasked_pairs
    ),
    "siglip-vision": Row(
        "siglip", lambda: SiglipVisionModel(siglip_config().vision_config), images
    ),
    "siglip-text": Row("siglip", lambda: SiglipTextModel(siglip_config().text_config), unmasked),
    "siglip-classifier": Row(
        "siglip", lambda: SiglipForImageClassification(siglip_config()), images
    ),
    "siglip2": Row(
        "siglip", lambda: Siglip2Model(siglip2_config()), lambda: patches() | unmasked()
    ),
    "module-conv": Row("module", conv_net, lambda: torch.rand(2, 3, 8, 8)),
    "module-bert": Row("module", lambda: BertForMaskedLM(BertConfig(**TEXT)), texts),
    "transformers": Row("transformers", lambda: BertForMaskedLM(BertConfig(**TEXT)), labelled),
    "module-clip": Row("module", lambda: CLIPModel(clip_config()), pairs),
}


PADDED = (texts, pairs, answered, statements, ended, ended_pairs)
WITH_TEXT = [name for name, row in ROWS.items() if row.batch in PADDED]


@dataclass(frozen=True)
class Case:
    model: nn.Module
    adapter: Adapter
    batch: Any
    weights: WeightMap


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    row = ROWS[request.param]
    torch.manual_seed(0)
    model = row.model().eval()
    made = ModuleAdapter(model) if row.adapter == "module" else vlp_adapters()[row.adapter]()
    return Case(model, made, row.batch(), WeightMap.of(model, made))


def test_every_adapter_has_a_row() -> None:
    assert {row.adapter for row in ROWS.values()} == {"module", *vlp_adapters()}


def test_claims_its_model(case: Case) -> None:
    assert case.adapter.name
    assert case.adapter.claims(case.model)
    assert not case.adapter.claims(nn.Linear(1, 1))


def test_canonical_names_are_unique_and_complete(case: Case) -> None:
    specs = list(case.adapter.weights(case.model))
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names)
    assert all(spec.name and spec.modality and spec.depth >= 0 and spec.owners for spec in specs)


def test_weights_come_in_the_order_of_the_parameters(case: Case) -> None:
    order = [path for path, _ in case.model.named_parameters(remove_duplicate=False)]
    positions = [order.index(weight.aliases[0]) for weight in case.weights.values()]
    assert positions == sorted(positions)


def test_every_parameter_is_prunable_or_explained(case: Case) -> None:
    prunable = {alias for weight in case.weights.values() for alias in weight.aliases}
    exclusions = list(case.adapter.exclusions(case.model))
    assert all(exclusion.reason for exclusion in exclusions)
    left = [
        path
        for path, _ in case.model.named_parameters(remove_duplicate=False)
        if path not in prunable and not any(re.search(e.pattern, path) for e in exclusions)
    ]
    assert left == []


def test_streams_reach_every_weight_with_declared_tokens(case: Case) -> None:
    """Every layer that runs reads `[batch, tokens, ...]` of its space, or one row per sample."""
    reached: set[str] = set()
    stream_of: dict[str, Any] = {}

    def check(name: str, owner: Owner) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0]
            mask = real_of(case.adapter, stream_of["now"], owner, inputs)
            if mask is not None and inputs.ndim > 2:
                assert mask.dtype == torch.bool
                assert mask.shape == inputs.shape[:-1], owner.module
            reached.add(name)

        return hook

    handles = [
        case.model.get_submodule(owner.module).register_forward_pre_hook(
            check(weight.name, owner), with_kwargs=True
        )
        for weight in case.weights.values()
        for owner in weight.owners
    ]
    with torch.no_grad():
        for stream in case.adapter.streams(case.model, case.batch):
            stream_of["now"] = stream
            stream.run()
    for handle in handles:
        handle.remove()
    assert reached == set(case.weights)


@pytest.mark.parametrize("case", WITH_TEXT, indirect=True)
def test_padding_is_declared(case: Case) -> None:
    """The batches with text have padding, and some stream says so."""
    streams = case.adapter.streams(case.model, case.batch)
    masks = [mask for stream in streams for mask in stream.real.values() if mask is not None]
    assert any(torch.equal(mask, case.batch["attention_mask"] != 0) for mask in masks)


def test_streams_leave_the_model_as_it_was(case: Case) -> None:
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    paths = [name for name, _ in case.model.named_modules()]
    trained = [p.requires_grad for p in case.model.parameters()]
    random = torch.random.get_rng_state()
    with torch.no_grad():
        for stream in case.adapter.streams(case.model, case.batch):
            stream.run()
    after = case.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert [name for name, _ in case.model.named_modules()] == paths
    assert not any(module.training for module in case.model.modules())
    assert [p.requires_grad for p in case.model.parameters()] == trained
    assert all(p.grad is None for p in case.model.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


def losses_of(case: Case, model: nn.Module, *, published: bool) -> dict[str, Tensor]:
    batch = case.batch
    if isinstance(batch, dict) and "attention_mask" in batch:
        words = {"mlm_input_ids": batch["input_ids"], "mlm_labels": batch["input_ids"]}
        batch = words | batch
    elif isinstance(batch, dict):
        batch = batch | {"labels": torch.tensor([0, 1])}
    return case.adapter.losses(model, batch, published=published)


@pytest.mark.parametrize("published", [False, True])
def test_losses_change_the_loss_state_alone_and_advance_changes_it_alike(
    case: Case, published: bool
) -> None:
    other = copy.deepcopy(case.model)
    before = copy.deepcopy(case.model.state_dict())
    random = torch.random.get_rng_state()
    try:
        losses = losses_of(case, case.model, published=published)
    except UnsupportedError:
        assert not list(case.adapter.loss_state(case.model))
        return
    assert losses
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert torch.equal(random, torch.random.get_rng_state())

    case.adapter.advance(other, case.batch, published=published)
    after, advanced = case.model.state_dict(), other.state_dict()
    assert all(torch.equal(value, advanced[name]) for name, value in after.items())
    state = {tensor.data_ptr() for tensor in case.adapter.loss_state(case.model)}
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert all(after[name].data_ptr() in state for name in changed)
    assert bool(changed) == bool(state)


def test_no_prunable_weight_is_part_of_the_loss_state(case: Case) -> None:
    state = {tensor.data_ptr() for tensor in case.adapter.loss_state(case.model)}
    assert not state & {weight.parameter.data_ptr() for weight in case.weights.values()}


def test_pretraining_covers_every_weight(case: Case) -> None:
    where = case.adapter.for_task("pretraining", case.model)
    assert set(where) == set(case.weights)
    for name, paths in where.items():
        assert paths
        shapes = {tuple(case.model.get_parameter(path).shape) for path in paths}
        assert shapes == {case.weights[name].shape}


def test_formats_of_others_are_not_loaded(case: Case) -> None:
    assert case.adapter.load("no/such/checkpoint") is None


def test_an_adapter_that_delegates_forgets_nothing():
    asked = {name for name, value in vars(Adapter).items() if callable(value) and name[0] != "_"}

    assert asked <= vars(DelegatingAdapter).keys()
