"""X-VLM's downstream models: made from pre-training weights, masked, fine-tuned, writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from xvlm_modeling_examples import tiny_batch, tiny_config

from vlp_adapters.xvlm import XvlmForCaptioning, XvlmForPretraining, XvlmForQuestionAnswering
from vlp_adapters.xvlm.adapter import XvlmAdapter
from vlp_plugins.loading import load_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError

ADAPTER = XvlmAdapter()
START, END, PROMPT = 1, 2, (5, 6)
ENDS = {"start_token_id": START, "end_token_id": END}


def pretrained(**options: Any) -> XvlmForPretraining:
    torch.manual_seed(0)
    model = XvlmForPretraining(tiny_config(**options)).eval()
    with torch.no_grad():  # so that texts differ by image and by question
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def captioning(**options: Any) -> XvlmForCaptioning:
    return XvlmForCaptioning.from_pretraining(pretrained(), **ENDS | options).eval()


def answering() -> XvlmForQuestionAnswering:
    return XvlmForQuestionAnswering.from_pretraining(pretrained(), **ENDS).eval()


def narrow_text() -> XvlmForPretraining:
    """Image tokens are 24 wide, text states 32: the default sizes of these tests."""
    return pretrained()


def equally_wide() -> XvlmForPretraining:
    vision = tiny_config().vision_config
    vision.hidden_size = 32
    return pretrained(vision_config=vision)


@pytest.mark.parametrize(
    ("made", "task"),
    [(XvlmForCaptioning, "captioning"), (XvlmForQuestionAnswering, "vqa")],
)
def test_weights_are_where_the_pretraining_model_says(made: Any, task: str) -> None:
    for source in (narrow_text(), equally_wide()):
        parameters = dict(made.from_pretraining(source, **ENDS).named_parameters())
        weights = WeightMap.of(source, ADAPTER)
        for name, paths in ADAPTER.for_task(task, source).items():
            assert paths
            for path in paths:
                assert torch.equal(parameters[path], weights[name].parameter), path


def test_the_decoder_of_answers_copies_the_fusion_layers() -> None:
    wide, narrow = equally_wide(), narrow_text()
    names = {f"decoder.{i}.cross.{part}" for i in range(2) for part in ("key", "value")}
    for source, has in ((wide, True), (narrow, False)):
        weights = WeightMap.of(XvlmForQuestionAnswering.from_pretraining(source, **ENDS), ADAPTER)
        assert (names <= set(weights)) == has
        copies = {n: w.copy_of for n, w in weights.items() if n.startswith("decoder.")}
        assert copies == {n: n.replace("decoder", "fusion") for n in copies}
        assert {weights[n].modality for n in copies} == {"fusion"}


@pytest.mark.parametrize("source", [narrow_text, equally_wide])
@pytest.mark.parametrize("made", [XvlmForCaptioning, XvlmForQuestionAnswering])
def test_masks_of_the_pretraining_model_fit_and_are_inherited(made: Any, source: Any) -> None:
    pretraining = source()
    masks = prune(pretraining, [tiny_batch()], method="multiflow", sparsity=0.5)
    model = made.from_pretraining(pretraining, **ENDS)
    masks.apply(model)
    assert masks.verify(model) == []
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert torch.equal(weight.parameter != 0, masks[weight.copy_of or name]), name


def test_a_token_sees_none_after_it_with_and_without_padding() -> None:
    model, batch = captioning(), tiny_batch()
    for mask in (torch.ones_like(batch["attention_mask"]), batch["attention_mask"]):
        later = batch["input_ids"].clone()
        later[:, 5:] = 9
        one, other = (
            model(batch["pixel_values"], ids, mask).logits for ids in (batch["input_ids"], later)
        )
        torch.testing.assert_close(one[:, :5], other[:, :5])
        assert not torch.allclose(one[:, 5:], other[:, 5:])


def test_attention_kernels_agree() -> None:
    model, batch = captioning(), tiny_batch()
    expected = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits
    model.set_attn_implementation("eager")
    found = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def greedy(model: XvlmForCaptioning, pixels: Tensor, length: int) -> Tensor:
    """A naive loop over the whole text, one image at a time."""
    rows = []
    for image in pixels:
        ids = [START, *PROMPT]
        while len(ids) < length + len(PROMPT) and END not in ids:
            context = model.encode_image(image[None])
            logits = model.text_decoder(torch.tensor([ids]), None, context).logits
            ids.append(int(logits[0, -1].argmax()))
        rows.append([START, *ids[1 + len(PROMPT) :]])
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def test_captions_are_those_of_a_naive_loop_after_the_prompt() -> None:
    model, pixels = captioning(prompt_ids=PROMPT), tiny_batch()["pixel_values"]
    found = ADAPTER.caption(model, {"pixel_values": pixels}, max_length=8)
    assert torch.equal(found, greedy(model, pixels, 8))
    assert len({tuple(row) for row in found.tolist()}) > 1, "captions depend on the image"


def test_texts_end_where_positions_do() -> None:
    model = captioning()
    model.config.end_token_id = 49
    ids = ADAPTER.caption(model, {"pixel_values": tiny_batch()["pixel_values"]}, max_length=99)
    assert ids.shape == (4, 16)


def likelihood(model: XvlmForCaptioning, pixels: Tensor, ids: Tensor) -> Tensor:
    logits = model.text_decoder(ids, None, model.encode_image(pixels)).logits.log_softmax(-1)
    return logits[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2))


def test_a_wide_beam_finds_captions_at_least_as_likely() -> None:
    model, pixels = captioning(), tiny_batch()["pixel_values"]
    batch = {"pixel_values": pixels}
    # Without an end token all captions have the same length, so likelihoods can be compared.
    model.config.end_token_id = 49
    one = ADAPTER.caption(model, batch, max_length=5)
    many = ADAPTER.caption(model, batch, max_length=5, num_beams=20)
    assert one.shape == many.shape == (4, 5)
    gain = likelihood(model, pixels, many) - likelihood(model, pixels, one)
    assert (gain > -1e-4).all()
    assert (gain > 1e-3).any()


def test_the_cache_of_keys_changes_no_answer() -> None:
    model, batch = answering(), tiny_batch()
    inputs = [batch[key] for key in ("pixel_values", "input_ids", "attention_mask")]
    for beams in (1, 3):
        fast, slow = (
            model.generate(*inputs, max_length=6, num_beams=beams, use_cache=use)
            for use in (True, False)
        )
        assert torch.equal(fast, slow)


def test_padding_of_a_question_changes_no_answer() -> None:
    model, batch = answering(), tiny_batch()
    answers = torch.randint(4, 50, (30, 4), generator=torch.manual_seed(1))
    real = torch.ones_like(answers)
    together = ADAPTER.rank_answers(model, batch, answers, real, candidates=30)
    written = ADAPTER.answer(model, batch, max_length=5)
    alone = {key: value[:1, :6] if value.ndim == 2 else value[:1] for key, value in batch.items()}
    assert int(together[0]) == int(
        ADAPTER.rank_answers(model, alone, answers, real, candidates=30)[0]
    )
    assert torch.equal(written[:1], ADAPTER.answer(model, alone, max_length=5))


def test_the_ranked_answer_is_the_most_likely_one() -> None:
    model, batch = answering(), tiny_batch()
    answers = torch.randint(4, 50, (12, 5), generator=torch.manual_seed(2))
    real = torch.ones_like(answers)
    real[3:8, 3:] = 0
    best = []
    states = model.read(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    for row in range(4):
        scores = []
        for ids, mask in zip(answers, real, strict=True):
            words = ids[mask.bool()].clone()
            words[0] = START
            logits = model.text_decoder(
                words[None], None, states[row : row + 1], batch["attention_mask"][row : row + 1]
            ).logits.log_softmax(-1)
            scores.append(float(logits[0, :-1].gather(1, words[1:, None]).sum().detach()))
        best.append(max(range(12), key=scores.__getitem__))
    found = ADAPTER.rank_answers(model, batch, answers, real, candidates=100)
    assert found.tolist() == best
    first = ADAPTER.rank_answers(model, batch, answers, real, candidates=1)
    logits = model.text_decoder(
        torch.full((4, 1), START), None, states, batch["attention_mask"]
    ).logits[:, 0]
    assert first.tolist() == logits[:, answers[:, 1]].argmax(1).tolist()


@pytest.mark.parametrize("made", [XvlmForCaptioning, XvlmForQuestionAnswering])
def test_a_few_steps_of_fine_tuning_lower_the_loss(made: Any) -> None:
    model = made.from_pretraining(pretrained(), **ENDS).train()
    batch = tiny_batch() | {"labels": torch.tensor([[1, 7, 2, 0], [1, 8, 9, 2]] * 2)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = ADAPTER.losses(model, batch)["lm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("made", [XvlmForCaptioning, XvlmForQuestionAnswering])
def test_it_comes_back_from_the_disk(made: Any, tmp_path: Path) -> None:
    model = made.from_pretraining(pretrained(), **ENDS).eval()
    model.save_pretrained(tmp_path)
    loaded, adapter = load_model(str(tmp_path), device="cpu")
    assert type(loaded) is made
    assert adapter.name == "xvlm"
    assert loaded.config.end_token_id == END
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_a_class_cannot_do_says_so() -> None:
    batch = tiny_batch()
    with pytest.raises(UnsupportedError, match="XvlmForPretraining writes no captions; load X-VLM"):
        ADAPTER.caption(pretrained(), batch, max_length=5)
    with pytest.raises(UnsupportedError, match="answers no questions"):
        ADAPTER.answer(captioning(), batch, max_length=5)
    with pytest.raises(UnsupportedError, match="no common space of images and texts"):
        ADAPTER.image_features(captioning(), batch)
    with pytest.raises(UnsupportedError, match="no weights to hand on to the vqa model"):
        ADAPTER.for_task("vqa", captioning())
    with pytest.raises(ValueError, match="end_token_id=102 is outside the vocabulary of 50"):
        XvlmForCaptioning.from_pretraining(pretrained(), start_token_id=1)


def test_the_mean_loss_is_the_cross_entropy_of_the_words_after_the_prompt() -> None:
    model, batch = captioning(prompt_ids=PROMPT, label_smoothing=0.0), tiny_batch()
    output = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    total, words = 0.0, 0
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        for place in range(1, length):
            logits = output.logits[row, place - 1 + len(PROMPT)].log_softmax(-1)
            total -= float(logits[batch["input_ids"][row, place]].detach())
            words += 1
    assert float(output.loss.detach()) == pytest.approx(total / words, rel=1e-5)
