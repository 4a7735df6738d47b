"""X-VLM trains, and says what is wrong with its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig
from xvlm_modeling_examples import tiny_batch, tiny_config

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import XvlmForPretraining

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
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)()
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
    with pytest.raises(ValueError, match="takes clip_vision_model, swin or vit"):
        tiny_config(vision_config=BertConfig())
