"""LoRA on pruned models: what is trained is what is merged, zeros and ties stay."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig

pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.lora import mask_updates, merge, removed_share, without_wrappers
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import MaskError, NonFiniteError, TieError, UnsupportedError


class Net(nn.Module):
    """A convolution, layers with and without LoRA, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 2, stride=2, padding=1, padding_mode="circular")
        self.one, self.two, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, pixels):
        states = self.patch(pixels).flatten(2).mean(-1)
        return self.head(states + self.two(torch.relu(self.one(states))))


BATCH = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))


def pruned(dtype=torch.float32, sparsity=0.75):
    torch.manual_seed(0)
    model = Net().to(dtype)
    adapter = ModuleAdapter(model)
    masks = prune(model, adapter=adapter, method="omp", sparsity=sparsity)
    masks.apply(model, adapter)
    return model, masks, adapter


def with_lora(model, **options):
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["patch", "one", "two"], **options}
    return get_peft_model(model, LoraConfig(**settings))


def train(tuned, steps=30, batch=BATCH, labels=LABELS, rate=0.03):
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=rate)
    tuned.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(tuned(batch).float(), labels)
        loss.backward()
        optimizer.step()
    tuned.eval()


@torch.no_grad()
def loss_of(model):
    return float(nn.functional.mse_loss(model(BATCH).float(), LABELS))


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"use_rslora": True}],
    ids=["plain", "dropout", "bias", "rslora"],
)
def test_the_merged_model_is_the_one_that_was_trained(options):
    model, masks, adapter = pruned()
    names = list(model.state_dict())
    tuned = with_lora(model, **options)
    mask_updates(tuned, masks, adapter)
    before = loss_of(tuned)
    train(tuned)
    with torch.no_grad():
        expected = tuned(BATCH)
    assert loss_of(tuned) < 0.8 * before

    merged = merge(tuned, masks, adapter)

    assert merged is model
    assert list(merged.state_dict()) == names
    assert masks.verify(merged, adapter) == []
    with torch.no_grad():
        torch.testing.assert_close(merged(BATCH), expected, atol=1e-5, rtol=1e-5)


def test_every_pruned_layer_learned_within_its_mask_only():
    model, masks, adapter = pruned()
    dense = copy.deepcopy(model)
    tuned = with_lora(model)
    mask_updates(tuned, masks, adapter)
    train(tuned)
    merged = merge(tuned, masks, adapter)
    for name in ("patch", "one", "two"):
        moved = merged.get_submodule(name).weight != dense.get_submodule(name).weight
        assert moved[masks[name]].float().mean() > 0.7  # some units are off
        assert not moved[~masks[name]].any()
    assert torch.equal(merged.head.weight, dense.head.weight)


def test_the_masked_forward_is_that_of_the_masked_weights():
    model, masks, adapter = pruned()
    tuned = with_lora(model)
    train(tuned, 5)
    by_hand = copy.deepcopy(model)
    for name in ("patch", "one", "two"):
        layer = tuned.base_model.model.get_submodule(name)
        weight = layer.base_layer.weight + layer.get_delta_weight("default") * masks[name]
        plain = copy.deepcopy(layer.base_layer)
        plain.weight = nn.Parameter(weight.detach())
        setattr(by_hand, name, plain)

    mask_updates(tuned, masks, adapter)

    with torch.no_grad():
        torch.testing.assert_close(tuned(BATCH), by_hand(BATCH), atol=1e-6, rtol=1e-5)


def test_masking_after_the_training_is_told_of_and_worse(caplog):
    model, masks, adapter = pruned(sparsity=0.9)
    early = with_lora(copy.deepcopy(model))
    late = with_lora(model)
    mask_updates(early, masks, adapter)
    train(late)
    train(early)
    share = removed_share(late, masks, adapter)
    update = late.base_model.model.one.get_delta_weight("default").detach()
    lost = update.masked_fill(masks["one"], 0)
    assert share["one"] == pytest.approx(float(lost.norm() / update.norm()), rel=1e-5)
    assert min(share.values()) <= share["all"] <= max(share.values())

    with caplog.at_level(logging.WARNING):
        late = merge(late, masks, adapter)
        assert f"remove {100 * share['all']:.1f}% of the norm" in caplog.text
        caplog.clear()
        early = merge(early, masks, adapter)
        assert not caplog.text

    assert masks.verify(late, adapter) == []
    assert loss_of(early) < loss_of(late)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model, masks, adapter = pruned(dtype)
    tuned = with_lora(model)
    mask_updates(tuned, masks, adapter)
    train(tuned, 5, BATCH.to(dtype))
    with torch.no_grad():
        expected = tuned(BATCH.to(dtype))
    merged = merge(tuned, masks, adapter)
    assert merged.one.weight.dtype == dtype
    assert masks.verify(merged, adapter) == []
    with torch.no_grad():
        torch.testing.assert_close(merged(BATCH.to(dtype)), expected, atol=0.05, rtol=0.05)


def test_saved_adapters_are_masked_again_after_loading(tmp_path):
    model, masks, adapter = pruned()
    fresh = copy.deepcopy(model)
    tuned = with_lora(model)
    mask_updates(tuned, masks, adapter)
    train(tuned, 5)
    tuned.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(fresh, tmp_path)
    mask_updates(again, masks, adapter)

    with torch.no_grad():
        assert torch.equal(again(BATCH), tuned(BATCH))
        expected = tuned(BATCH)
        again.merge_adapter()
        torch.testing.assert_close(again(BATCH), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(UnsupportedError, match="unmerge_adapter"):
            merge(again, masks, adapter)
        again.unmerge_adapter()
        torch.testing.assert_close(again(BATCH), expected, atol=1e-5, rtol=1e-5)


def tiny_blip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    text = {"vocab_size": 20, "max_position_embeddings": 8, "pad_token_id": 0, "sep_token_id": 3}
    return BlipForPretraining(
        BlipPretrainConfig(
            vision_config=BlipVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=BlipTextConfig(**sizes, **text),
            embed_dim=8,
            queue_size=8,
            dec_token_id=5,
            enc_token_id=6,
        )
    ).eval()


def blip_outputs(model):
    ids = torch.tensor([[6, 7, 8, 3], [6, 9, 3, 0]])
    mask = ids.ne(0).long()
    image = model.vision_model(torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16))[0]
    seen = {"encoder_hidden_states": image, "attention_mask": mask}
    encoded = model.text_encoder(input_ids=ids, **seen)[0]
    decoded = model.text_decoder(input_ids=ids, **seen)
    return [image, encoded, decoded[0] if isinstance(decoded, tuple) else decoded.logits]


CROSS = r".*(crossattention\.self\.(query|value)|intermediate\.dense|self_attn\.qkv)"


def test_towers_that_share_weights_learn_one_update_and_stay_tied():
    model = tiny_blip()
    masks = prune(model, method="omp", sparsity=0.6)
    masks.apply(model)
    count = model.num_parameters()
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=CROSS))
    mask_updates(tuned, masks)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        sum(out.square().mean() for out in blip_outputs(tuned.get_base_model())).backward()
        optimizer.step()
    with torch.no_grad():
        expected = blip_outputs(tuned.get_base_model())
        untrained = blip_outputs(tiny_blip())

    merged = merge(tuned, masks)

    encoder = merged.text_encoder.encoder.layer[0].crossattention.self.query
    decoder = merged.text_decoder.bert.encoder.layer[0].crossattention.self.query
    assert encoder.weight is decoder.weight
    assert merged.num_parameters() == count
    assert masks.verify(merged) == []
    with torch.no_grad():
        for found, wanted, old in zip(blip_outputs(merged), expected, untrained, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
            assert (found - old).abs().max() > 1e-3


def test_towers_that_learned_different_updates_cannot_be_merged():
    model = tiny_blip()
    masks = prune(model, method="omp", sparsity=0.6)
    masks.apply(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=CROSS, init_lora_weights=False))
    with pytest.raises(TieError, match=r"different updates; call mask_updates before training"):
        merge(tuned, masks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": False}, "adapter 'second' was trained to different updates"),
        ({"target_modules": r"text_enc.*cross.*query"}, "only some have the adapter 'second'"),
        ({"alpha_pattern": {r"text_decoder.*": 9}}, "adapter 'second' has other ranks or scales"),
        ({"rank_pattern": {r"text_decoder.*": 1}}, "adapter 'second' has other ranks or scales"),
    ],
    ids=["values", "modules", "scales", "ranks"],
)
def test_inactive_adapters_of_a_shared_weight_are_not_lost(options, words):
    model = tiny_blip()
    masks = prune(model, method="omp", sparsity=0.6)
    masks.apply(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=CROSS))
    tuned.add_adapter("second", LoraConfig(**{"r": 2, "target_modules": CROSS, **options}))
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    with pytest.raises(TieError, match=words):
        mask_updates(tuned, masks)
    assert before.keys() == tuned.state_dict().keys()
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_one_tower_alone_of_a_shared_weight_is_refused():
    model = tiny_blip()
    masks = prune(model, method="omp", sparsity=0.6)
    masks.apply(model)
    only = r"text_encoder.*crossattention\.self\.query"
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=only))
    with pytest.raises(TieError, match=r"of 2 modules, of which 1 have LoRA.*text_decoder"):
        mask_updates(tuned, masks)


def test_what_cannot_be_masked_is_refused():
    model, masks, adapter = pruned()
    with pytest.raises(UnsupportedError, match="Net is not a PeftModel"):
        merge(model, masks, adapter)
    with pytest.raises(UnsupportedError, match="DoraLinearVariant"):
        mask_updates(
            with_lora(copy.deepcopy(model), use_dora=True, target_modules=["one"]), masks, adapter
        )
    other = get_peft_model(copy.deepcopy(model), IA3Config(
        target_modules=["one"], feedforward_modules=[]
    ))  # fmt: skip
    with pytest.raises((UnsupportedError, MaskError)):
        merge(other, masks, adapter)


def test_a_diverged_update_is_not_merged():
    model, masks, adapter = pruned()
    tuned = with_lora(model)
    before = model.one.base_layer.weight.clone()
    with torch.no_grad():
        tuned.base_model.model.one.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="'one'"):
        merge(tuned, masks, adapter)
    assert torch.equal(tuned.base_model.model.one.base_layer.weight, before)


def test_masks_that_are_not_applied_are_refused():
    model, masks, adapter = pruned()
    nn.init.ones_(model.one.weight)
    with pytest.raises(MaskError, match="apply the masks before get_peft_model"):
        mask_updates(with_lora(model), masks, adapter)


def test_modules_that_are_saved_whole_are_held_by_a_lock():
    model, masks, adapter = pruned()
    tuned = with_lora(model, target_modules=["one"], modules_to_save=["head"])
    mask_updates(tuned, masks, adapter)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.03)
    with without_wrappers(tuned) as inside:
        lock = SparsityLock(inside, masks, adapter).attach(optimizer)
    before = model.head.original_module.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        tuned(BATCH).square().mean().backward()
        optimizer.step()
    lock.check()
    merged = merge(tuned, masks, adapter)
    assert isinstance(merged.head, nn.Linear)
    assert not torch.equal(merged.head.weight, before)
    assert masks.verify(merged, adapter) == []
