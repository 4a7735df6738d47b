"""X-VLM computes what the published implementation computes, and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, CLIPVisionConfig, SwinConfig

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig, load_original, mask_tokens
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


def tiny_config(**options: Any) -> XvlmPretrainConfig:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        fusion_layer=1,
    )
    return XvlmPretrainConfig(
        **({"vision_config": vision, "text_config": text, "embed_dim": 8} | options)
    )


def tiny_batch(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 50, (rows, 10), generator=generator)
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[0, 6:] = 0
    masked, labels = mask_tokens(
        ids, mask, mask_token_id=3, vocab_size=50, special_ids=(0, 1, 2), generator=generator
    )
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": masked,
        "mlm_labels": labels,
    }


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


# --- training ---


def test_a_few_steps_of_training_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = XvlmForPretraining(tiny_config()).train()
    batch = tiny_batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        output = model(**batch, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        values.append(output.loss.item())
    assert values[-1] < 0.8 * values[0]


def test_gradients_reach_everything_but_the_box_head() -> None:
    model = XvlmForPretraining(tiny_config())
    model(**tiny_batch()).loss.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert without == {name for name, _ in model.named_parameters() if "bbox" in name}


def test_losses_can_be_switched_off() -> None:
    model = XvlmForPretraining(tiny_config()).eval()
    batch = tiny_batch()
    with torch.no_grad():
        output = model(**batch, losses=("itc", "mlm"))
        alone = model(**batch, losses=("itc",))
    assert list(output.losses) == ["itc", "mlm"]
    assert output.negatives is None
    assert output.loss == output.losses["itc"] + output.losses["mlm"]
    assert alone.loss == output.losses["itc"]


def test_bfloat16_autocast_stays_near_float32() -> None:
    torch.manual_seed(0)
    model = XvlmForPretraining(tiny_config()).eval()
    negatives = ([1, 2, 3, 0], [3, 0, 1, 2])
    with torch.no_grad():
        full = model(**tiny_batch(), negatives=negatives).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(**tiny_batch(), negatives=negatives).loss
    assert half.item() == pytest.approx(full.item(), rel=0.05)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    text: Any = config.text_config
    text.hidden_dropout_prob = text.attention_probs_dropout_prob = 0.0
    model = XvlmForPretraining(config).train()
    negatives = ([1, 2, 3, 0], [3, 0, 1, 2])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**tiny_batch(), negatives=negatives).loss.backward()
        key = model.text_encoder.bert.encoder.layer[2].crossattention.self.key.weight
        gradients.append(key.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_no_word_to_predict_is_zero_not_nan() -> None:
    model = XvlmForPretraining(tiny_config()).eval()
    batch = tiny_batch() | {"mlm_labels": torch.full((4, 10), IGNORED)}
    assert model(**batch).losses["mlm"] == 0.0


# --- bad input ---


def test_bad_input_says_what_to_do() -> None:
    model = XvlmForPretraining(tiny_config()).eval()
    batch = tiny_batch()
    with pytest.raises(ValueError, match="mask_tokens"):
        model(**(batch | {"mlm_labels": None}))
    with pytest.raises(ValueError, match="choose one or more of itc, itm, mlm"):
        model(**batch, losses=("itc", "lm"))
    with pytest.raises(ValueError, match=r"negative images \[1, 2, 3, 4\] and .* do not fit"):
        model(**batch, negatives=([1, 2, 3, 4], [1, 2, 3, 0]))
    with pytest.raises(ValueError, match="at least 2"):
        model(**tiny_batch(1))


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves no text layer"):
        tiny_config(fusion_layer=3)
    with pytest.raises(ValueError, match="takes clip_vision_model or swin"):
        tiny_config(vision_config=BertConfig())


# --- masking ---


def test_mask_tokens_predicts_ordinary_tokens_only() -> None:
    ids = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 16, 17, 2], [1, 20, 21, 2, 0, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    generator = torch.Generator().manual_seed(0)
    masked, labels = mask_tokens(
        ids, mask, mask_token_id=3, vocab_size=30, special_ids=(0, 1, 2), generator=generator
    )
    target = labels != IGNORED
    assert target.sum(dim=1).tolist() == [2, 1]  # a quarter of 8; at least one of 2
    assert torch.equal(labels[target], ids[target])
    assert torch.equal(masked[~target], ids[~target])
    assert not target[ids < 3].any()


def test_mask_tokens_follows_80_10_10_and_its_generator() -> None:
    ids = torch.randint(4, 1000, (50, 200), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"mask_token_id": 3, "vocab_size": 1000, "probability": 0.5}
    first, labels = mask_tokens(
        ids, torch.ones_like(ids), generator=torch.Generator().manual_seed(5), **options
    )
    again, _ = mask_tokens(
        ids, torch.ones_like(ids), generator=torch.Generator().manual_seed(5), **options
    )
    target = labels != IGNORED
    assert torch.equal(first, again)
    assert target.float().mean().item() == 0.5
    assert (first[target] == 3).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (first[target] == ids[target]).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_mask_tokens_leaves_an_empty_caption_alone() -> None:
    ids = torch.tensor([[1, 2, 0]])
    masked, labels = mask_tokens(
        ids, torch.tensor([[1, 1, 0]]), mask_token_id=3, vocab_size=9, special_ids=(0, 1, 2)
    )
    assert torch.equal(masked, ids)
    assert (labels == IGNORED).all()


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_mask_tokens_refuses_a_wrong_probability(probability: float) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        mask_tokens(ids, ids, mask_token_id=3, vocab_size=9, probability=probability)
