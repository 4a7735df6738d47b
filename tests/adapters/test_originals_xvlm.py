"""Checkpoints of X-VLM's original code base: loaded, compared with its outputs, written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from originals import TOLERANCE, base_state, base_tensors, compare, recorded, settings
from safetensors.torch import load_file
from tiny_models import save_photos, save_tokenizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_masks import random_masks
from transformers.initialization import no_init_weights
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from vlp_command import command

from vlp_adapters.xvlm import (
    XvlmForCaptioning,
    XvlmForNlvr,
    XvlmForPretraining,
    XvlmForQuestionAnswering,
    XvlmForRetrieval,
    XvlmPretrainConfig,
    load_original,
    save_original,
)
from vlp_adapters.xvlm.adapter import XvlmAdapter
from vlp_adapters.xvlm.convert import OPTIONS, infer_config, state_to_original
from vlp_plugins.loading import describe_file, load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.published_files import export_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError

ADAPTER = XvlmAdapter()
CLASSES = {
    "xvlm_pretrain_clip": XvlmForPretraining,
    "xvlm_pretrain_swin": XvlmForPretraining,
    "xvlm_pretrain_deit": XvlmForPretraining,
    "xvlm_retrieval_clip": XvlmForRetrieval,
    "xvlm_retrieval_swin": XvlmForRetrieval,
    "xvlm_captioning_clip": XvlmForCaptioning,
    "xvlm_vqa_clip": XvlmForQuestionAnswering,
    "xvlm_nlvr_clip": XvlmForNlvr,
}
RECORDED = [name for name in CLASSES if name != "xvlm_retrieval_swin"]
PRETRAINED = [name for name in RECORDED if "pretrain" in name]
Record = Callable[[str, object], None]


def write(folder: Path, name: str, **changes: Tensor) -> Path:
    """A file as the original saves it, and next to it what shapes do not tell."""
    path = folder / f"{name}.th"
    torch.save({"model": recorded(name, "state") | changes, "config": {"image_res": 32}}, path)
    path.with_suffix(".json").write_text(json.dumps(settings(name)))
    return path


def loaded(name: str, folder: Path) -> Any:
    model, adapter = load_model(str(write(folder, name)))
    assert adapter.name == "xvlm"
    assert type(model) is CLASSES[name]
    assert not model.training
    return model


# --- the recorded outputs ---


def pair_outputs(model: Any, name: str, **masked: Tensor) -> dict[str, Tensor]:
    """What pre-training and retrieval models have in common."""
    inputs, outputs = recorded(name, "inputs"), recorded(name, "outputs")
    pixels, ids, mask = inputs["image"], inputs["input_ids"], inputs["attention_mask"]
    images, texts = model.encode_image(pixels), model.encode_text(ids, mask)
    negatives = (outputs["negative_image"].tolist(), outputs["negative_text"].tolist())
    torch.manual_seed(5)  # as the original's forward was run
    drawn = model(pixels, ids, mask, **masked)
    assert drawn.negatives == negatives
    given = model(pixels, ids, mask, negatives=negatives, **masked)
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    fused = model.fuse(texts, mask, images)
    return {
        "image_embeds": images,
        "text_embeds": texts,
        "image_feat": ADAPTER.image_features(model, batch),
        "text_feat": ADAPTER.text_features(model, batch),
        "cross_embeds": fused,
        "itm_logits": model.itm_head(fused[:, 0]),
    } | {f"loss_{term}": value for term, value in given.losses.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", PRETRAINED)
def test_originals_of_pretraining(name: str, tmp_path: Path, record_property: Record) -> None:
    model = loaded(name, tmp_path)
    inputs = recorded(name, "inputs")
    ids, positions, words = (inputs[key] for key in ("text_ids_masked", "masked_pos", "masked_ids"))
    labels = torch.full_like(ids, -100)
    for row, places in enumerate(positions):
        labels[row, places[words[row] != -100]] = words[row][words[row] != -100]
    outputs = pair_outputs(model, name, mlm_input_ids=ids, mlm_labels=labels)
    hidden = model.layers(ids, inputs["attention_mask"], outputs["image_embeds"])
    hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    outputs["mlm_logits"] = model.mlm_logits(hidden)
    assert len(outputs) == 10
    compare(name, outputs, record_property)


@torch.no_grad()
def test_originals_of_retrieval(tmp_path: Path, record_property: Record) -> None:
    model = loaded("xvlm_retrieval_clip", tmp_path)
    outputs = pair_outputs(model, "xvlm_retrieval_clip")
    assert len(outputs) == 8
    compare("xvlm_retrieval_clip", outputs, record_property)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xvlm_pretrain_swin", "xvlm_pretrain_deit"])
def test_originals_of_retrieval_with_other_image_encoders(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    """The same tensors without the heads of pre-training, under the names of a retrieval file."""
    state = {
        key.replace("text_encoder.bert.", "text_encoder."): value
        for key, value in recorded(name, "state").items()
        if not key.startswith(("text_encoder.cls.", "bbox_head."))
    }
    torch.save({"model": state}, tmp_path / "checkpoint_best.pth")
    model: Any = load_original(tmp_path / "checkpoint_best.pth", **settings(name))
    assert type(model) is XvlmForRetrieval
    assert state_to_original(model).keys() == state.keys()
    compare(name, pair_outputs(model, name), record_property)
    masks = random_masks(loaded(name, tmp_path), adapter=ADAPTER)
    masks.apply(model)
    assert masks.verify(model) == []


@torch.no_grad()
def test_originals_of_vqa(tmp_path: Path, record_property: Record) -> None:
    model = loaded("xvlm_vqa_clip", tmp_path)
    inputs, outputs = recorded("xvlm_vqa_clip", "inputs"), recorded("xvlm_vqa_clip", "outputs")
    pixels, questions, mask = inputs["image"], inputs["question_ids"], inputs["question_mask"]
    rows = torch.tensor([0, 1, 1, 2])  # the question of every answer
    answers, real = inputs["answer_ids"], inputs["answer_mask"]
    labels = answers.masked_fill(real == 0, -100)
    states = model.read(pixels, questions, mask)
    each = []
    for n, q in enumerate(rows):
        question = pixels[q : q + 1], questions[q : q + 1], mask[q : q + 1]
        answer = answers[n : n + 1], real[n : n + 1], labels[n : n + 1]
        words = real[n].sum() - 1  # the original sums over words
        each.append(inputs["answer_weights"][n] * words * model(*question, *answer).loss)
    start = torch.full((3, 1), 2)
    made = {
        "image_embeds": model.encode_image(pixels),
        "question_states": states,
        "answer_logits": model(pixels[rows], questions[rows], mask[rows], answers, real).logits,
        "first_logits": model.text_decoder(start, None, states, mask).logits[:, 0],
        "loss": torch.stack(each).sum() / len(questions),
    }
    # The original adds the first word's log-probability twice; `rank_answers` does not.
    answers, real = inputs["answer_list_ids"], inputs["answer_list_mask"]
    first = made["first_logits"].log_softmax(-1)[:, answers[:, 1]]
    chosen = first.topk(8, dim=1)
    scores = []
    for q, (starts, numbers) in enumerate(zip(*chosen, strict=True)):
        context = states[[q] * 8], mask[[q] * 8]
        logits = model.text_decoder(answers[numbers], real[numbers], *context).logits[:, :-1]
        words = logits.log_softmax(-1).gather(2, answers[numbers, 1:, None])[..., 0]
        scores.append(starts + (words * real[numbers, 1:]).sum(1))
    order = torch.stack(scores).sort(dim=1, descending=True)
    made["rank_k8_probs"] = order.values.softmax(dim=1)
    assert torch.equal(chosen.indices.gather(1, order.indices), outputs["rank_k8_ids"])
    compare("xvlm_vqa_clip", made, record_property)
    batch = {"pixel_values": pixels, "input_ids": questions, "attention_mask": mask}
    best = ADAPTER.rank_answers(
        model, batch, inputs["answer_list_ids"], inputs["answer_list_mask"], candidates=8
    )
    assert torch.equal(best, outputs["rank_k8_ids"][:, 0])


@torch.no_grad()
def test_originals_of_captioning(tmp_path: Path, record_property: Record) -> None:
    model = loaded("xvlm_captioning_clip", tmp_path)
    inputs, outputs = (
        recorded("xvlm_captioning_clip", "inputs"),
        recorded("xvlm_captioning_clip", "outputs"),
    )
    pixels, ids, mask = inputs["image"], inputs["input_ids"], inputs["attention_mask"]
    images = model.encode_image(pixels)
    logits = model.text_decoder(ids, mask, images).logits
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100  # [CLS] and the prompt, which the recorded captions do not all have
    prompt = inputs["prompt_input_ids"]
    made = {
        "image_embeds": images,
        "logits": logits,
        "prompt_logits": model.text_decoder(prompt, None, images).logits,
        "loss": model.words_loss(logits, labels),
    }
    compare("xvlm_captioning_clip", made, record_property)
    for beams in (1, 3):
        written = model.generate(pixels, max_length=13, num_beams=beams, min_length=6)
        expected = outputs[f"generated_ids_beams{beams}"]
        assert torch.equal(expected[:, :4], prompt[:1].expand(3, -1))
        assert torch.equal(written, torch.cat([expected[:, :1], expected[:, 4:]], dim=1))


@torch.no_grad()
def test_originals_of_nlvr2(tmp_path: Path, record_property: Record) -> None:
    model = loaded("xvlm_nlvr_clip", tmp_path)
    inputs, expected = recorded("xvlm_nlvr_clip", "inputs"), recorded("xvlm_nlvr_clip", "outputs")
    batch = {
        "pixel_values": torch.stack(inputs["image"].chunk(2), dim=1),  # all left ones came first
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "labels": inputs["targets"],
    }
    output = model(**batch)
    (loss,) = ADAPTER.losses(model, batch).values()
    made = {
        "image_embeds": model.encode_image(inputs["image"]),
        "logits": output.logits,
        "loss": loss,
    }
    compare("xvlm_nlvr_clip", made, record_property)
    odds = expected["logits"][:, 1] - expected["logits"][:, 0]
    assert torch.allclose(ADAPTER.judge(model, batch), odds, atol=TOLERANCE)


# --- written back ---


@pytest.mark.parametrize(
    ("name", "file"),
    [*((name, "again.pth") for name in RECORDED), ("xvlm_vqa_clip", "again.safetensors")],
)
def test_originals_are_written_back_as_they_came(name: str, file: str, tmp_path: Path) -> None:
    """Every name, of tied parameters and buffers too: the original's loader is strict."""
    model = loaded(name, tmp_path)
    model.save_pretrained(tmp_path / "folder")
    model, _ = load_model(str(tmp_path / "folder"))
    assert type(model) is CLASSES[name]
    save_original(model, tmp_path / file)
    is_pth = file.endswith(".pth")
    written = torch.load(tmp_path / file)["model"] if is_pth else load_file(tmp_path / file)
    expected = recorded(name, "state")
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert written[key].dtype == value.dtype
        assert torch.equal(written[key], value), key


@pytest.mark.parametrize("name", CLASSES)
def test_originals_of_the_published_size_have_all_keys(
    name: str,
) -> None:
    with FakeTensorMode(), no_init_weights():
        state = base_state(name)
        config: Any = infer_config(state)
        model = CLASSES[name](config)
        written = state_to_original(model)
    assert {
        key: (list(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in written.items()
    } == base_tensors(name)
    assert config.text_config.num_attention_heads == 12
    assert config.text_config.num_hidden_layers == 12
    assert config.fusion_layer == 6
    assert config.vision_config.image_size == 224
    heads = [4, 8, 16, 32] if "swin" in name else 12
    assert config.vision_config.num_attention_heads == heads


# --- pruned ---


def batch_of(name: str) -> dict[str, Tensor]:
    inputs = recorded(name, "inputs")
    ids = "question_ids" if "vqa" in name else "input_ids"
    mask = "question_mask" if "vqa" in name else "attention_mask"
    pixels = inputs["image"]
    batch = {"input_ids": inputs[ids], "attention_mask": inputs[mask]}
    if "nlvr" in name:
        return batch | {
            "pixel_values": torch.stack(pixels.chunk(2), dim=1), "labels": inputs["targets"]
        }  # fmt: skip
    if "vqa" in name:
        batch["labels"] = inputs["answer_ids"][[0, 1, 3]]
    if "pretrain" in name:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        batch |= {"mlm_input_ids": inputs["text_ids_masked"], "mlm_labels": labels}
    return batch | {"pixel_values": pixels}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("method", ["omp", "multiflow", "snip"])
def test_originals_are_pruned(name: str, method: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    masks = prune(model, [batch_of(name)], method=method, sparsity=0.5)
    weights = WeightMap.of(model, ADAPTER)
    assert masks.removed == int(0.5 * weights.numel)
    masks.apply(model)
    export_published(masks, tmp_path / "masks.pth", weights, ADAPTER)
    written = torch.load(tmp_path / "masks.pth", weights_only=True)
    original = state_to_original(model)
    for key, mask in written.items():
        assert not original[key.removesuffix("_pruning_mask")][mask == 0].any()


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa", "nlvr"])
def test_masks_of_the_pretraining_original_fit_that_of_the_task(task: str, tmp_path: Path) -> None:
    pretrained = loaded("xvlm_pretrain_clip", tmp_path)
    masks = random_masks(pretrained, adapter=ADAPTER)
    model = loaded(f"xvlm_{task}_clip", tmp_path)
    masks.apply(model)
    assert masks.verify(model) == []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    where = ADAPTER.for_task("nlvr2" if task == "nlvr" else task, pretrained)
    for name, paths in where.items():
        assert paths
        for path in paths:
            assert not parameters[path][~masks[name]].any(), path


@pytest.mark.parametrize("name", ["xvlm_pretrain_swin", "xvlm_pretrain_deit", "xvlm_pretrain_clip"])
@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa", "nlvr2"])
def test_originals_of_pretraining_become_the_model_of_a_task(
    name: str, task: str, tmp_path: Path
) -> None:
    pretrained = loaded(name, tmp_path)
    tokenizer = SimpleNamespace(cls_token_id=2, sep_token_id=3)
    model = ADAPTER.downstream_model(task, pretrained, tokenizer=tokenizer)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = WeightMap.of(pretrained, ADAPTER)
    prefix = "bert." if task == "retrieval" else ""  # stays the pre-training model
    for weight, paths in ADAPTER.for_task(task, pretrained).items():
        for path in paths:
            own = path.replace("text_encoder.", f"text_encoder.{prefix}")
            assert torch.equal(parameters[own], weights[weight].parameter), path
    random_masks(pretrained, adapter=ADAPTER).apply(model)
    batch = batch_of(name)
    if task == "vqa":
        batch["labels"] = batch["input_ids"]
    if task == "nlvr2":
        pixels = batch["pixel_values"]
        batch["pixel_values"] = torch.stack([pixels, pixels.flip(0)], dim=1)
        batch["labels"] = torch.tensor([0, 1, 1])
    losses = ADAPTER.task_losses(task, model, batch)
    assert all(loss.isfinite() for loss in losses.values())


def test_originals_work_on_the_command_line(tmp_path: Path) -> None:
    processor, photos = tmp_path / "processor", save_photos(tmp_path / "photos", 6)
    save_tokenizer(processor)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(processor)
    file = write(tmp_path, "xvlm_retrieval_clip")
    with_data = ("--data", photos, "--processor", processor, "--device", "cpu")
    out = tmp_path / "out"
    command("prune", "--model", file, "--method", "wanda", "--sparsity", 0.5, "--out", out,
            *with_data)  # fmt: skip
    masks = out / "masks-0.5.safetensors"
    assert Masks.load(masks).sparsity == pytest.approx(0.5, abs=1e-4)
    shown = command("evaluate", file, "--task", "retrieval", "--masks", masks, *with_data).stdout
    assert "mean recall" in shown
    tuned = tmp_path / "tuned"
    command("finetune", file, "--task", "retrieval", "--masks", masks, "--batch-size", 3,
            "--steps", 1, "--out", tuned, *with_data)  # fmt: skip
    model, _ = load_model(str(tuned), device="cpu")
    assert type(model) is XvlmForRetrieval
    assert Masks.load(masks).verify(model) == []


# --- what shapes do not tell ---


def test_originals_whose_heads_cannot_be_guessed_name_the_keyword(tmp_path: Path) -> None:
    path = write(tmp_path, "xvlm_vqa_clip")
    path.with_suffix(".json").unlink()
    with pytest.raises(UnsupportedError, match="attention heads cannot be guessed"):
        load_model(str(path))
    heads = {"vision_heads": 3, "text_heads": 2}
    with pytest.raises(UnsupportedError, match=r"118 words.*pass start_token_id and end_token_id"):
        load_original(path, **heads)
    for wrong, match in (
        ({"vision_heads": 5}, r"vision_heads is 5, not a number that divides the 48"),
        ({"text_heads": "2"}, r"text_heads is '2'"),
        ({"end_token_id": 118}, r"end_token_id has 118, which is no id of a vocabulary of 118"),
        ({"start_token_id": True}, r"start_token_id has True"),
    ):
        path.with_suffix(".json").write_text(json.dumps(settings("xvlm_vqa_clip") | wrong))
        with pytest.raises(UnsupportedError, match=match):
            load_model(str(path))
    path.with_suffix(".json").write_text('{"heads": 2}')
    with pytest.raises(UnsupportedError, match=rf"has heads.*takes {', '.join(OPTIONS)}"):
        load_model(str(path))


def test_originals_of_captioning_have_the_published_prompt_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeTensorMode():
        state = base_state("xvlm_captioning_clip")
        config: Any = infer_config(state)
        assert (config.start_token_id, config.end_token_id) == (101, 102)
        assert config.prompt_ids == [1037, 3861, 1997]
        (record,) = caplog.records
        assert "'a picture of'" in record.getMessage()
        assert infer_config(state, prompt_ids=[7]).to_dict()["prompt_ids"] == [7]
    assert len(caplog.records) == 1


def test_swin_of_another_resolution_is_read_from_its_window_masks() -> None:
    state = recorded("xvlm_pretrain_swin", "state")
    config: Any = infer_config(state, text_heads=2)
    assert config.vision_config.image_size == 64
    mask = "vision_encoder.layers.0.blocks.1.attn_mask"
    wider = state | {mask: torch.zeros(256, 4, 4)}
    assert infer_config(wider, text_heads=2).to_dict()["vision_config"]["image_size"] == 128
    del wider[mask]
    assert infer_config(wider, text_heads=2).to_dict()["vision_config"]["image_size"] == 64


# --- what they are ---


@pytest.mark.parametrize("name", RECORDED)
def test_originals_are_described(name: str, tmp_path: Path) -> None:
    _, task, tower = name.split("_")
    task = {"pretrain": "pretraining", "nlvr": "nlvr2"}.get(task, task)
    tower = {"clip": "CLIP", "swin": "Swin", "deit": "DeiT"}[tower]
    expected = f"original X-VLM checkpoint of {task}, {tower} image encoder"
    assert describe_file(str(write(tmp_path, name))) == expected


@pytest.mark.parametrize(
    ("drop", "add", "what"),
    [
        (("temp", "vision_proj", "text_proj", "itm_head", "text_encoder.cls"), {}, "grounding"),
        (("itm_head",), {"ta_head.weight": torch.zeros(1)}, r"another task \(bbox_head, ta_head\)"),
    ],
)
def test_originals_without_a_class_are_described_and_refused(
    drop: tuple[str, ...], add: dict[str, Tensor], what: str, tmp_path: Path
) -> None:
    state = recorded("xvlm_pretrain_clip", "state")
    state = {key: value for key, value in state.items() if not key.startswith(drop)} | add
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UnsupportedError, match=rf"X-VLM.*{what}.*no class.*fine-tune"):
        load_model(str(tmp_path / "other.pth"))
    with pytest.raises(UnsupportedError, match=r"no class for it here"):
        infer_config(state)


def test_originals_that_are_damaged_say_what_is_wrong(tmp_path: Path) -> None:
    bias = "text_decoder.cls.predictions.bias"
    path = write(tmp_path, "xvlm_vqa_clip", **{bias: torch.ones(118)})
    with pytest.raises(UnsupportedError, match=r"predictions\.\S*bias differs from .*ties them"):
        load_model(str(path))
    key = "text_encoder.encoder.layer.2.crossattention.self.key.weight"
    path = write(tmp_path, "xvlm_nlvr_clip", **{key: torch.ones(32, 48)})
    with pytest.raises(UnsupportedError, match=r"layer\.2\S+ differs from \S+layer\.1\S+, but"):
        load_model(str(path))
    path = write(tmp_path, "xvlm_retrieval_clip", extra=torch.ones(1))
    with pytest.raises(UnsupportedError, match=r"unknown to the model, 1 parameter.*\(extra\)"):
        load_model(str(path))
    path = write(tmp_path, "xvlm_retrieval_clip")
    with pytest.raises(UnsupportedError, match=r"is a XvlmRetrievalConfig, not a XvlmPretrain"):
        load_original(path, XvlmPretrainConfig())
    for key, wrong in (
        ("vision_encoder.patch_embed.weight", torch.ones(())),
        ("vision_encoder.pos_embed.weight", torch.ones(0, 48)),
        ("text_encoder.embeddings.word_embeddings.weight", torch.ones(118)),
        ("text_encoder.encoder.layer.0.intermediate.dense.weight", torch.ones(0)),
    ):
        path = write(tmp_path, "xvlm_retrieval_clip", **{key: wrong})
        with pytest.raises(UnsupportedError, match=r"retrieval_clip\.th"):
            load_model(str(path))
