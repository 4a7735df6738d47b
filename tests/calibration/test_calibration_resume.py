"""A data pass that is interrupted loses at most the batches since its last checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from toy import Counting, ToyAdapter, toy_batches, toy_model

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import InputSecondMoment
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, OutputError, StatisticsError

BATCHES = 9


def run(batches: Any, **options: Any) -> Statistics:
    model, adapter = toy_model(), options.pop("adapter", ToyAdapter())
    needs = options.pop("statistics", [InputSecondMoment()])
    return calibrate(model, adapter, WeightMap.of(model, adapter), batches, needs, **options)


def same_bits(a: Statistics, b: Statistics) -> bool:
    fields = ("samples", "batches", "fingerprint", "structure", "adapter", "published", "shapes")
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and list(a.sums) == list(b.sums)
        and all(torch.equal(a.sums[key], b.sums[key]) for key in a.sums)
    )


def broken_after(count: int, error: BaseException) -> Iterator[Batch]:
    yield from toy_batches(BATCHES)[:count]
    raise error


@pytest.fixture(scope="module")
def uninterrupted() -> Statistics:
    return run(toy_batches(BATCHES))


@pytest.mark.parametrize("after", [1, 4, 8])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("network"), DataError("bad shard")])
def test_an_interrupted_pass_resumes_to_the_same_bits(tmp_path, uninterrupted, after, error):
    path = tmp_path / "pass.ckpt"
    with pytest.raises(type(error)):
        run(broken_after(after, error), checkpoint=path)

    counting = Counting()
    resumed = run(toy_batches(BATCHES), checkpoint=path, resume=True, statistics=[counting])
    assert same_bits(resumed, uninterrupted)
    full = Counting()
    run(toy_batches(BATCHES), statistics=[full])
    per_batch = len(full.tokens) // BATCHES
    assert len(counting.tokens) == (BATCHES - after) * per_batch
    assert path.exists(), "the caller deletes it"


def test_a_pass_can_be_interrupted_again_and_again(tmp_path, uninterrupted):
    path = tmp_path / "pass.ckpt"
    for after in (2, 3, 7):
        with pytest.raises(KeyboardInterrupt):
            run(broken_after(after, KeyboardInterrupt()), checkpoint=path, resume=True)
    assert same_bits(run(toy_batches(BATCHES), checkpoint=path, resume=True), uninterrupted)


def test_a_finished_pass_resumes_without_running_the_model(tmp_path, uninterrupted):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(BATCHES), checkpoint=path)
    counting = Counting()
    again = run(toy_batches(BATCHES), checkpoint=path, resume=True, statistics=[counting])
    assert same_bits(again, uninterrupted)
    assert counting.tokens == []


def test_a_checkpoint_of_few_batches_can_be_continued_with_more(tmp_path, uninterrupted):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(BATCHES), checkpoint=path, limit=4)
    assert same_bits(run(toy_batches(BATCHES), checkpoint=path, resume=True), uninterrupted)
    with pytest.raises(StatisticsError, match="holds 9 batches already, more than limit=4"):
        run(toy_batches(BATCHES), checkpoint=path, resume=True, limit=4)


def test_progress_counts_the_replayed_batches(tmp_path):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(BATCHES), checkpoint=path, limit=4)
    seen: list[int] = []
    run(toy_batches(6), checkpoint=path, resume=True, progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_checkpoints_are_written_every_few_batches(tmp_path):
    path = tmp_path / "pass.ckpt"
    written: list[int] = []

    def watch(done: int, total: int | None) -> None:
        if path.exists():
            written.append(done)
            path.unlink()

    run(toy_batches(BATCHES), checkpoint=path, checkpoint_every=4, progress=watch)
    assert written == [4, 8]
    assert path.exists(), "the last batch is saved at the end"


def test_without_a_checkpoint_resuming_starts_from_the_first_batch(tmp_path, uninterrupted, caplog):
    path = tmp_path / "pass.ckpt"
    with caplog.at_level(logging.WARNING, "vlp_plugins.calibration"):
        assert same_bits(run(toy_batches(BATCHES), checkpoint=path, resume=True), uninterrupted)
    assert "starting from the first batch" in caplog.text
    with pytest.raises(StatisticsError, match="resume needs the checkpoint file"):
        run(toy_batches(BATCHES), resume=True)


def test_a_checkpoint_that_is_not_resumed_is_said_to_be_overwritten(tmp_path, caplog):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(2), checkpoint=path)
    with caplog.at_level(logging.WARNING, "vlp_plugins.calibration"):
        assert run(toy_batches(3, seed=7), checkpoint=path).batches == 3
    assert "not resumed and will be overwritten" in caplog.text


def test_other_data_is_named_by_its_first_batch(tmp_path):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(4), checkpoint=path)
    before = path.read_bytes()
    other = toy_batches(BATCHES)
    other[2] = other[2] | {"pixel_values": other[2]["pixel_values"] + 1}
    with pytest.raises(DataError, match=r"batch 2 is not the one that checkpoint .*pass.ckpt"):
        run(other, checkpoint=path, resume=True)
    with pytest.raises(DataError, match="has seen 4 batches, but the data gave only 3"):
        run(toy_batches(3), checkpoint=path, resume=True)
    assert path.read_bytes() == before


def test_checkpoints_of_another_pass_are_refused(tmp_path):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(2), checkpoint=path)

    class Other(InputSecondMoment):
        name = "other"

    with pytest.raises(StatisticsError, match=r"its statistics is \['input_second_moment'\]"):
        run(toy_batches(2), checkpoint=path, resume=True, statistics=[Other()])
    with pytest.raises(StatisticsError, match="its published is False, this one's is True"):
        run(toy_batches(2), checkpoint=path, resume=True, published=True)

    model, adapter = toy_model(), ToyAdapter()
    with torch.no_grad():
        model.feed.weight[0, 0] += 1
    weights = WeightMap.of(model, adapter)
    with pytest.raises(StatisticsError, match="its weights is"):
        calibrate(
            model, adapter, weights, toy_batches(2), [InputSecondMoment()],
            checkpoint=path, resume=True,
        )  # fmt: skip


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(2), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StatisticsError, match="damaged, truncated.*delete it and run the pass"):
        run(toy_batches(2), checkpoint=path, resume=True)


def test_a_checkpoint_of_several_processes_asks_for_as_many(tmp_path):
    path = tmp_path / "pass.ckpt"
    path.with_name("pass.ckpt.rank0of2").write_bytes(b"")
    with pytest.raises(StatisticsError, match="rank0of2 was written by another number of proc"):
        run(toy_batches(2), checkpoint=path, resume=True)


def test_a_checkpoint_that_cannot_be_written_stops_the_pass(tmp_path):
    (tmp_path / "pass.ckpt").mkdir()
    with pytest.raises(OutputError):
        run(toy_batches(3), checkpoint=tmp_path / "pass.ckpt", checkpoint_every=1)


SCRIPT = """
import sys, time
from pathlib import Path
from toy import ToyAdapter, toy_batches, toy_model
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import InputSecondMoment
from vlp_plugins.models.weights import WeightMap

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
model, adapter = toy_model(), ToyAdapter()

def batches():
    for index, batch in enumerate(toy_batches(9)):
        if index == stop:
            (folder / "waiting").touch()
            time.sleep(60)
        yield batch

calibrate(model, adapter, WeightMap.of(model, adapter), batches(), [InputSecondMoment()],
          checkpoint=folder / "pass.ckpt", checkpoint_every=3)
"""


@pytest.mark.parametrize(
    ("number", "left"), [(signal.SIGKILL, 6), (signal.SIGINT, 8)], ids=["kill -9", "Ctrl-C"]
)
def test_a_process_that_is_killed_loses_only_the_last_batches(
    tmp_path, uninterrupted, number, left
):
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "8"],
        env=environment,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0

    counting, full = Counting(), Counting()
    path = tmp_path / "pass.ckpt"
    resumed = run(toy_batches(BATCHES), checkpoint=path, resume=True, statistics=[counting])
    run(toy_batches(1), statistics=[full])
    assert len(counting.tokens) == (BATCHES - left) * len(full.tokens)
    assert same_bits(resumed, uninterrupted)
