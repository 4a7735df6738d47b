"""Training and measuring the demo models: schedule, steps, resumption, figures."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.demo import chat, schedule
from benchmarks.demo.courses import COURSES, ChatCourse, CourseName, course_of
from benchmarks.demo.evaluate import evaluate, evaluate_chat, recall_at_1, rerank
from benchmarks.demo.families import build, load
from benchmarks.demo.processors import FAMILIES, Family, build_tokenizer
from benchmarks.demo.samples import draw_sample
from benchmarks.demo.scenes import CHAT_OBJECTS
from benchmarks.demo.schedule import Clock
from benchmarks.demo.train import (
    STATE_FILE,
    agree_on_time,
    build_optimizer,
    descend,
    take_step,
    train,
)

SIXTEEN_MB = 16_000_000


def test_recall_counts_rows_and_columns_whose_pair_is_strictly_best() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.9], [0.3, 0.8, 0.2], [0.1, 0.85, 0.95]])
    # image 0 ties with a wrong text, so only images 1 and 2 count; text 1 prefers image 2
    by_image, by_text = recall_at_1(similarity)
    naive = [
        sum(all(m[i, i] > m[i, j] for j in range(3) if j != i) for i in range(3))
        for m in (similarity, similarity.T)
    ]
    assert [by_image, by_text] == pytest.approx([100 * hits / 3 for hits in naive])


def test_reranking_lets_the_head_choose_among_the_candidates_only() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(20, 20, generator=generator)
    among = similarity.topk(5, dim=1).indices == torch.arange(20)[:, None]

    def perfect(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return (images == texts).float()

    assert rerank(similarity, 20, perfect) == (100.0, 100.0)
    assert rerank(similarity, 5, perfect)[0] == pytest.approx(100 * among.any(1).float().mean())


def test_schedule_from_start_to_end() -> None:
    assert schedule.learning_rate(0, 0.0) < 0.01 * schedule.PEAK_LEARNING_RATE
    rates = [schedule.learning_rate(10_000, p / 10) for p in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert schedule.single_fraction(0.0) > 0.5
    assert schedule.single_fraction(0.3) == schedule.single_fraction(1.0) == 0
    assert not schedule.use_matching(0, 0.49)
    assert [schedule.use_matching(step, 0.9) for step in range(4)] == [True, False, True, False]


def test_a_clock_counts_time_or_steps() -> None:
    assert Clock(minutes=1, steps=None, step=7, seconds=30).progress == 0.5
    assert Clock(minutes=None, steps=10, step=7, seconds=30).progress == 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_new_models_are_small_enough_and_have_unlike_towers(family: Family, tmp_path: Path) -> None:
    model = build(family, build_tokenizer(family))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < SIXTEEN_MB
    vision = model.vision_model if family == "blip" else model.vision_encoder
    text = model.text_encoder if family == "blip" else model.text_encoder.bert
    wide = next(p for n, p in vision.named_parameters() if n.endswith("mlp.fc1.weight"))
    narrow = next(
        p for n, p in text.named_parameters() if n.endswith("layer.0.intermediate.dense.weight")
    )
    assert wide.shape[1] > narrow.shape[1]
    assert narrow.std() > 1.5 * wide.std()


@pytest.mark.parametrize("name", COURSES)
def test_a_few_steps_lower_every_loss(name: CourseName) -> None:
    torch.manual_seed(0)
    course = course_of(name)
    course.model.train()
    optimizer = build_optimizer(course.model, decay=course.decay)
    clock = Clock(minutes=None, steps=30, step=14)  # half-way: with the matching loss
    batch = tuple(part[:8] for part in next(course.batches(0, clock)))
    history = []
    for _ in range(8):
        clock.step = 16
        history.append(take_step(course, optimizer, batch, clock, False))
    last = {"blip": "lm", "xvlm": "mlm", "chat": "answers"}[name]
    others = {"naming"} if name == "chat" else {"itc", "itm"}
    assert set(history[0]) == {last} | others
    assert history[-1][last] < history[0][last]


def test_the_chat_model_starts_with_one_spread_and_learns_to_name_first() -> None:
    torch.manual_seed(0)
    course = ChatCourse()
    matrices = [p for p in course.model.parameters() if p.ndim > 1]
    assert all(0.018 < float(p.detach().std()) < 0.022 for p in matrices)
    course.model.train()
    optimizer = build_optimizer(course.model, decay=1.0, embeddings=True)
    clock = Clock(minutes=None, steps=1000, step=20)
    batch = next(course.batches(0, clock))
    history = [take_step(course, optimizer, batch, clock, False) for _ in range(20)]
    assert set(history[0]) == {"naming"}
    assert history[-1]["naming"] < 0.8 * history[0]["naming"]
    decoder = course.model.model.language_model.layers[0].mlp.up_proj.weight
    assert decoder.grad is None  # its turn comes


def test_a_run_logs_saves_loads_and_resumes(tmp_path: Path) -> None:
    args = Namespace(
        seed=0, resume=False, bf16=False, save_minutes=1e6, evaluate_minutes=1e6, log_steps=1
    )
    train("xvlm", tmp_path, Clock(minutes=None, steps=2), args)
    with (tmp_path / "train.jsonl").open("a") as log_file:
        log_file.write('{"step": 3}\n')  # a step that was logged, but lost before the next save
    args.resume = True
    train("xvlm", tmp_path, Clock(minutes=None, steps=3), args)
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3]
    assert {"r1_i2t", "r1_t2i", "itc", "mlm"} <= set(log[-1])
    assert (tmp_path / STATE_FILE).exists()
    family, model = load(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    figures = evaluate(model, tokenizer, family, draw_sample("test", 20, seed=0), candidates=5)
    assert set(figures) == {"r1_i2t", "r1_t2i", "r1_i2t_reranked", "r1_t2i_reranked"}
    assert all(0 <= value <= 100 for value in figures.values())


@pytest.mark.long
def test_two_processes_step_along_the_mean_gradient_by_one_clock(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_take_a_step, (tmp_path,), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["weights"], torch.tensor([[-0.15, -0.15]]))
        assert found["seconds"] == 10.0  # the first one's


def _take_a_step(rank: int, folder: Path) -> None:
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    descend(model, optimizer, {"loss": 0.1 * (1 + rank) * model(torch.ones(2)).sum()})
    clock = Clock(minutes=1, steps=None, seconds=10.0 + rank)
    agree_on_time(clock)
    found = {"weights": model.weight.detach(), "seconds": clock.seconds}
    torch.save(found, folder / f"{rank}.pt")


def test_captions_of_an_untrained_model_are_measured(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("blip")
    model = build("blip", tokenizer)
    figures = evaluate(model, tokenizer, "blip", draw_sample("test", 10, seed=0, held_out=True))
    assert figures["captions_right"] == 0.0


def test_a_chat_run_saves_what_transformers_loads_and_answers_are_measured(tmp_path: Path) -> None:
    args = Namespace(
        seed=0, resume=False, bf16=False, save_minutes=1e6, evaluate_minutes=1e6, log_steps=1
    )
    train("chat", tmp_path, Clock(minutes=None, steps=1), args)
    (record,) = map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    assert {"naming", "answers_right", "captions_right", "answer_loss"} <= set(record)
    assert (tmp_path / "model.safetensors").stat().st_size < SIXTEEN_MB
    sample = draw_sample("test", 20, seed=0, objects=CHAT_OBJECTS, held_out=True)
    figures = evaluate_chat(*chat.load(tmp_path), sample)
    assert set(record) - {
        "step",
        "seconds",
        "progress",
        "batch_size",
        "learning_rate",
        "naming",
    } <= (set(figures))
    assert figures["captions_right"] == 0.0
    assert 0 <= figures["answers_right"] < 50


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model; expected a BLIP or X-VLM"):
        load(tmp_path)
