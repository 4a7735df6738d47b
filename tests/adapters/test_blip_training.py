"""BLIP's losses, and the state that training moves: momentum copies and queues."""

from __future__ import annotations

import pytest
import torch
from blip_modeling_examples import tiny_batch, tiny_config
from torch.nn import functional

from vlp_adapters.blip import BlipForPretraining


@pytest.fixture
def tiny() -> BlipForPretraining:
    torch.manual_seed(0)
    return BlipForPretraining(tiny_config(position_init_std=0.3)).eval()


# --- losses ---


def test_every_trained_parameter_gets_a_gradient_and_no_twin_does(
    tiny: BlipForPretraining,
) -> None:
    tiny(**tiny_batch()).loss.backward()
    for name, parameter in tiny.named_parameters():
        is_twin = "_m." in name
        assert (parameter.grad is None) == is_twin, name


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = BlipForPretraining(tiny_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = model(**tiny_batch(), negatives=([1, 2, 3, 0], [3, 0, 1, 2]))
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["lm"].item())
    assert losses[-1] < 0.7 * losses[0]


def test_losses_can_be_chosen(tiny: BlipForPretraining) -> None:
    output = tiny(**tiny_batch(), losses=("itc", "lm"))
    assert set(output.losses) == {"itc", "lm"}
    assert output.negatives is None
    with pytest.raises(ValueError, match="choose one or more of itc, itm, lm"):
        tiny(**tiny_batch(), losses=("mlm",))


def test_negatives_may_be_given_for_the_first_pairs_only(tiny: BlipForPretraining) -> None:
    few = ([1, 2], [3, 0])
    output = tiny(**tiny_batch(6), update_state=False, negatives=few)
    assert output.negatives == few
    image = tiny.encode_image(tiny_batch(6)["pixel_values"])
    ids, mask = tiny_batch(6)["input_ids"], tiny_batch(6)["attention_mask"]
    texts, images = [0, 1, 0, 1, 3, 0], [0, 1, 1, 2, 0, 1]
    logits = tiny.match_logits(ids[texts], mask[texts], image[images])
    expected = functional.cross_entropy(logits, torch.tensor([1, 1, 0, 0, 0, 0]))
    torch.testing.assert_close(output.losses["itm"], expected)


def test_negatives_never_are_the_own_partner(tiny: BlipForPretraining) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        output = tiny(**tiny_batch(), update_state=False, generator=generator)
        for chosen in output.negatives:
            assert all(row != own for own, row in enumerate(chosen))


@pytest.mark.parametrize("negatives", [([0, 1], [1]), ([4, 0, 0, 0], [1, 0, 0, 0]), ([], [])])
def test_negatives_that_do_not_fit_are_refused(
    tiny: BlipForPretraining, negatives: tuple[list[int], list[int]]
) -> None:
    with pytest.raises(ValueError, match="do not fit a batch of 4 pairs"):
        tiny(**tiny_batch(), negatives=negatives)


def test_one_pair_has_no_negative(tiny: BlipForPretraining) -> None:
    with pytest.raises(ValueError, match="leave 'itm' out"):
        tiny(**tiny_batch(1))


def test_soft_targets_are_those_of_the_momentum_networks(tiny: BlipForPretraining) -> None:
    hard, soft = (
        tiny(**tiny_batch(), update_state=False, losses=("itc",), alpha=alpha).loss
        for alpha in (0.0, 1.0)
    )
    half = tiny(**tiny_batch(), update_state=False, losses=("itc",), alpha=0.5).loss
    torch.testing.assert_close(half, (hard + soft) / 2)
    assert not torch.isclose(hard, soft)


# --- state ---


def test_a_forward_without_state_update_leaves_the_model_as_it_was(
    tiny: BlipForPretraining,
) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    tiny(**tiny_batch(), update_state=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    tiny(**tiny_batch())
    changed = {name for name, value in tiny.state_dict().items() if not value.equal(before[name])}
    assert {"image_queue", "text_queue", "queue_ptr"} <= changed
    assert all("_m." in name or "queue" in name for name in changed)


def test_twins_follow_their_networks_slowly(tiny: BlipForPretraining) -> None:
    with torch.no_grad():
        tiny.vision_proj.weight += 1.0
    before = tiny.vision_proj_m.weight.clone()
    tiny(**tiny_batch(), losses=("itc",))
    expected = torch.full_like(before, 1 - tiny.config.momentum)
    torch.testing.assert_close(tiny.vision_proj_m.weight - before, expected, rtol=1e-3, atol=1e-6)


def test_the_queue_starts_over_at_its_end(tiny: BlipForPretraining) -> None:
    for _ in range(2):
        tiny(**tiny_batch(5), losses=("itc",))
    assert tiny.queue_ptr.item() == 10
    tiny(**tiny_batch(5), losses=("itc",))  # 12 columns: two at the end, three at the start
    assert tiny.queue_ptr.item() == 3
    features = tiny.get_image_features(tiny_batch(5)["pixel_values"])
    columns = tiny.image_queue[:, [10, 11, 0, 1, 2]].T
    torch.testing.assert_close(columns, features, rtol=0, atol=1e-3)


def test_autocast_and_half_precision_run(tiny: BlipForPretraining) -> None:
    batch = tiny_batch() | {"update_state": False, "negatives": ([1, 2, 3, 0], [1, 2, 3, 0])}
    exact = tiny(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0, check_dtype=False)
    half = tiny.to(torch.bfloat16)(**batch).loss
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0, check_dtype=False)
