"""X-VLM computes what the published implementation computes; sizes, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, SwinConfig
from xvlm_modeling_examples import tiny_batch, tiny_config

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig, load_original
from vlp_adapters.xvlm.convert import infer_config

GOLDEN = Path(__file__).parents[1] / "golden" / "xvlm"


OUTPUTS = json.loads((GOLDEN / "outputs.json").read_text())


EXCLUDED = ("vision_proj", "text_proj", "itm_head", "bbox_head", "text_encoder.cls")


DECODER = "text_encoder.cls.predictions.decoder.weight"


def word_labels(batch: dict[str, Tensor]) -> Tensor:
    """The golden `masked_pos` and `masked_ids` (padded with -100) as labels `[B, L]`."""
    labels = torch.full_like(batch["text_ids"], IGNORED)
    row, slot = (batch["masked_ids"] != IGNORED).nonzero(as_tuple=True)
    labels[row, batch["masked_pos"][row, slot]] = batch["masked_ids"][row, slot]
    return labels


def inputs(index: int, file: str = "batches") -> dict[str, Tensor]:
    """Forward arguments of one golden batch."""
    batch = {
        name: value[index] for name, value in load_file(GOLDEN / f"{file}.safetensors").items()
    }
    return {
        "pixel_values": batch["image"],
        "input_ids": batch["text_ids"],
        "attention_mask": batch["text_atts"],
        "mlm_input_ids": batch["text_ids_masked"],
        "mlm_labels": word_labels(batch),
    }


@pytest.fixture(params=["eager", "sdpa"])
def golden(request: pytest.FixtureRequest) -> XvlmForPretraining:
    config = infer_config(load_file(GOLDEN / "model.safetensors"), vision_heads=4, text_heads=4)
    model = load_original(GOLDEN / "model.safetensors", config)
    model.set_attn_implementation(request.param)
    return model


# --- the published implementation ---


def test_losses_and_negatives_of_six_batches(golden: XvlmForPretraining) -> None:
    torch.manual_seed(0)  # once: the draws of a batch depend on those before
    for index, expected in enumerate(OUTPUTS["sequence"]):
        with torch.no_grad():
            output = golden(**inputs(index))
        drawn = expected["negatives"][0]
        assert output.negatives == (drawn["image_neg"], drawn["text_neg"])
        assert output.loss.item() == pytest.approx(expected["losses"]["total"], abs=1e-5)
        for name, value in output.losses.items():
            assert value.item() == pytest.approx(expected["losses"][name], abs=1e-5)


def test_parts_give_the_published_tensors(golden: XvlmForPretraining) -> None:
    batch = inputs(0)
    mask = batch["attention_mask"]
    with torch.no_grad():
        image = golden.encode_image(batch["pixel_values"])
        text = golden.encode_text(batch["input_ids"], mask)
        words = golden.fuse(golden.encode_text(batch["mlm_input_ids"], mask), mask, image)
        chosen = OUTPUTS["batch0"]["negatives"][0]
        images, texts = chosen["image_neg"], chosen["text_neg"]
        parts = {
            "image_embeds": image,
            "text_embeds": text,
            "cross_embeds": golden.fuse(text, mask, image),
            "image_feat": golden.get_image_features(batch["pixel_values"]),
            "text_feat": golden.get_text_features(batch["input_ids"], mask),
            "itm_logits": golden.match_logits(
                torch.cat([text, text, text[texts]]),
                torch.cat([mask, mask, mask[texts]]),
                torch.cat([image, image[images], image]),
            ),
        }
        position = load_file(GOLDEN / "batches.safetensors")["masked_pos"][0]
        rows = torch.arange(len(position))[:, None]
        parts["mlm_logits"] = golden.mlm_logits(words[rows, position])
    expected = load_file(GOLDEN / "outputs.safetensors")
    for name, value in parts.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def test_injected_negatives_replace_the_draw(golden: XvlmForPretraining) -> None:
    recorded = OUTPUTS["batch0"]["negatives"][0]
    negatives = (recorded["image_neg"], recorded["text_neg"])
    state = torch.get_rng_state()
    with torch.no_grad():
        output = golden(**inputs(0), negatives=negatives, losses=("itm",))
    assert output.loss.item() == pytest.approx(OUTPUTS["batch0"]["losses"]["itm"], abs=1e-5)
    assert output.negatives == negatives
    assert torch.equal(torch.get_rng_state(), state)


# --- attention is bidirectional, and padding is invisible ---


def test_an_earlier_token_sees_a_later_one(golden: XvlmForPretraining) -> None:
    batch = inputs(0)
    everything = torch.ones_like(batch["attention_mask"])  # no padding: sdpa gets no mask at all
    changed = batch["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 7) % 100
    with torch.no_grad():
        image = golden.encode_image(batch["pixel_values"])
        before = golden.encode_text(batch["input_ids"], everything)
        after = golden.encode_text(changed, everything)
        assert (before[:, 0] - after[:, 0]).abs().amax(dim=-1).min() > 1e-4
        # Text layers apart: change only the last input of the fusion layers.
        last = before.clone()
        last[:, -1] += 1.0
        moved = golden.fuse(last, everything, image) - golden.fuse(before, everything, image)
        assert moved[:, 0].abs().amax(dim=-1).min() > 1e-4


def test_switching_attention_reaches_every_layer(golden: XvlmForPretraining) -> None:
    for kind in ("eager", "sdpa"):
        golden.set_attn_implementation(kind)
        kinds = {
            module.config._attn_implementation
            for module in golden.modules()
            if type(module).__name__ in ("BertSelfAttention", "BertCrossAttention", "CLIPAttention")
        }
        assert kinds == {kind}


def test_padding_changes_no_real_token(golden: XvlmForPretraining) -> None:
    batch = inputs(0)
    real = batch["attention_mask"].bool()
    noise = batch["input_ids"].masked_fill(~real, 77)
    with torch.no_grad():
        image = golden.encode_image(batch["pixel_values"])
        outputs = [
            golden.fuse(golden.encode_text(ids, real), real, image)[real]
            for ids in (batch["input_ids"], noise)
        ]
    assert not real.all()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_eager_and_sdpa_agree_when_text_is_as_long_as_the_image() -> None:
    model = load_original(
        GOLDEN / "model.safetensors",
        infer_config(load_file(GOLDEN / "model.safetensors"), vision_heads=4, text_heads=4),
    )
    outputs = []
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            outputs.append(model(**inputs(0, "batches_len17"), generator=generator))
    assert outputs[0].negatives == outputs[1].negatives
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=0, atol=1e-5)


# --- size, saving, new weights ---


def test_base_size_has_the_published_number_of_prunable_weights() -> None:
    with torch.device("meta"):
        model = XvlmForPretraining(XvlmPretrainConfig.base())
    prunable = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(EXCLUDED)
    }
    assert sum(prunable.values()) == 184_025_088


def test_save_and_load_keep_weights_and_tie(tmp_path: Path) -> None:
    model = XvlmForPretraining(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, XvlmForPretraining)
    assert AutoConfig.from_pretrained(tmp_path).fusion_layer == 1
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    words = loaded.get_input_embeddings()
    assert isinstance(words, nn.Embedding)
    assert loaded.text_encoder.cls.predictions.decoder.weight is words.weight
    assert DECODER not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        losses = [
            m(**tiny_batch(), generator=torch.Generator().manual_seed(1)).loss
            for m in (model, loaded)
        ]
    assert losses[0] == losses[1]


def test_swin_encoder_gives_a_mean_token_and_survives_saving(tmp_path: Path) -> None:
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    model = XvlmForPretraining(tiny_config(vision_config=swin)).eval()
    images = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = XvlmForPretraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        tokens = model.encode_image(images)
        assert tokens.shape == (2, 1 + 16, 16)
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))
        assert torch.equal(loaded.encode_image(images), tokens)
        assert model.get_image_features(images).shape == (2, 8)


def test_position_embeddings_of_both_towers_start_as_wide_as_asked() -> None:
    torch.manual_seed(0)
    wide = XvlmForPretraining(tiny_config(position_init_std=0.3))
    usual = XvlmForPretraining(tiny_config())
    for model, std in ((wide, 0.3), (usual, 0.02)):
        text = model.text_encoder.bert.embeddings.position_embeddings.weight
        vision = model.vision_encoder.embeddings.position_embedding.weight
        assert text.std().item() == pytest.approx(std, rel=0.2)
        assert vision.std().item() == pytest.approx(std, rel=0.3)
        assert model.temp.item() == pytest.approx(0.07)


def test_loading_does_not_draw_positions_anew(tmp_path: Path) -> None:
    model = XvlmForPretraining(tiny_config(position_init_std=0.3))
    model.save_pretrained(tmp_path)
    loaded = XvlmForPretraining.from_pretrained(tmp_path)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value), name
