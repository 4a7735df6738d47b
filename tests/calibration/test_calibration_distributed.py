"""Several processes give the same statistics as one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import ToyAdapter, toy_batches, toy_model
from toy_loss import LosingAdapter, losing_toy, spoilt
from two_processes import run_two_processes

from vlp_plugins.calibration.checkpoint import FORM, unpack_state
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import InputSecondMoment, MeanGradient
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.errors import StatisticsError

BATCHES = 7

SCRIPT = """
import sys
from pathlib import Path
from torch import distributed
from toy import Counting, ToyAdapter, toy_batches, toy_model
from toy_loss import LosingAdapter, losing_toy, spoilt
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.runtime.errors import DataError, NonFiniteError
from vlp_plugins.runtime.distributed import before_joining
from vlp_plugins.calibration.moments import MeanGradient
from vlp_plugins.models.weights import WeightMap

folder = Path(sys.argv[1])
before_joining()
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model, adapter = toy_model(), ToyAdapter()
weights = WeightMap.of(model, adapter)

def run(batches, **options):
    counting = Counting()
    return calibrate(model, adapter, weights, batches, [counting], **options), counting

def broken(count):
    yield from toy_batches(7)[:count]
    raise KeyboardInterrupt

found, counting = run(toy_batches(7))
found.save(folder / f"whole{rank}")
(folder / f"calls{rank}").write_text(str(len(counting.tokens)))

try:
    run(broken(3 + rank), checkpoint=folder / "pass.ckpt")  # stopped at different batches
except KeyboardInterrupt:
    pass
found, _ = run(toy_batches(7), checkpoint=folder / "pass.ckpt", resume=True)
found.save(folder / f"resumed{rank}")

found, _ = run(toy_batches(1))
found.save(folder / f"single{rank}")

def run_losses(batches, **options):
    model, adapter, counting = losing_toy(), LosingAdapter(), Counting()
    weights = WeightMap.of(model, adapter)
    statistics = [MeanGradient(), counting]
    return calibrate(model, adapter, weights, batches, statistics, **options)

run_losses(toy_batches(7)).save(folder / f"losses{rank}")
batches = toy_batches(7)
batches[3] = spoilt(batches[3])
run_losses(batches, skip_nonfinite=True).save(folder / f"skipped{rank}")
run_losses(toy_batches(1)).save(folder / f"few{rank}")

def stopped():
    yield from toy_batches(7)[:4]
    raise KeyboardInterrupt

try:
    run_losses(stopped(), checkpoint=folder / "losses.ckpt")
except KeyboardInterrupt:
    pass
found = run_losses(toy_batches(7), checkpoint=folder / "losses.ckpt", resume=True)
found.save(folder / f"continued{rank}")

try:
    run_losses([spoilt(batch) for batch in toy_batches(3)], skip_nonfinite=True)
except NonFiniteError as error:
    (folder / f"nothing{rank}").write_text(str(error))

try:
    run(toy_batches(4, seed=rank))
except DataError as error:
    (folder / f"error{rank}").write_text(str(error))
distributed.barrier()  # gloo may abort a process whose peer is still at work
distributed.destroy_process_group()
"""


def alone(count: int) -> Statistics:
    model, adapter = toy_model(), ToyAdapter()
    weights = WeightMap.of(model, adapter)
    return calibrate(model, adapter, weights, toy_batches(count), [InputSecondMoment()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes under torchrun left what they found."""
    folder = tmp_path_factory.mktemp("torchrun")
    run_two_processes(SCRIPT, folder)
    return folder


@pytest.mark.parametrize(("name", "count"), [("whole", 7), ("resumed", 7), ("single", 1)])
def test_both_processes_return_what_one_process_finds(folder, name, count):
    expected = alone(count)
    for rank in (0, 1):
        found = Statistics.load(folder / f"{name}{rank}")
        assert found.sums.keys() == expected.sums.keys()
        for key, value in expected.sums.items():
            assert torch.equal(found.sums[key], value), key
        assert found.fingerprint == expected.fingerprint
        assert found.samples == expected.samples
        assert found.batches == count


def losses_alone(batches: list[dict[str, torch.Tensor]]) -> Statistics:
    model, adapter = losing_toy(), LosingAdapter()
    weights = WeightMap.of(model, adapter)
    statistics = [MeanGradient(), InputSecondMoment()]
    return calibrate(model, adapter, weights, batches, statistics, skip_nonfinite=True)


@pytest.mark.parametrize("name", ["losses", "continued", "skipped", "few"])
def test_gradients_of_losses_that_remember_are_those_of_one_process(folder, name):
    batches = toy_batches(1 if name == "few" else 7)
    if name == "skipped":
        batches[3] = spoilt(batches[3])
    expected = losses_alone(batches)
    for rank in (0, 1):
        found = Statistics.load(folder / f"{name}{rank}")
        assert found.sums.keys() == expected.sums.keys()
        for key, value in expected.sums.items():
            assert torch.equal(found.sums[key], value), key
        assert found.counted == expected.counted
        assert found.samples == expected.samples


def test_no_process_waits_for_batches_that_all_were_left_out(folder):
    for rank in (0, 1):
        assert "all 3 batches were left out" in (folder / f"nothing{rank}").read_text()


def test_each_process_runs_whole_batches_in_turn(folder):
    calls = [int((folder / f"calls{rank}").read_text()) for rank in (0, 1)]
    per_batch = sum(calls) // BATCHES
    assert calls == [4 * per_batch, 3 * per_batch]


def test_each_process_has_its_own_checkpoint(folder):
    assert sorted(path.name for path in folder.glob("pass.ckpt*")) == [
        "pass.ckpt.rank0of2",
        "pass.ckpt.rank1of2",
    ]
    for world in (1, 3):
        file = Checkpoint(folder / "pass.ckpt", FORM, {}, unit="batch", shard=(0, world))
        with pytest.raises(StatisticsError, match="another number of processes"):
            file.load(unpack_state)


def test_processes_that_read_different_data_are_told(folder):
    for rank in (0, 1):
        message = (folder / f"error{rank}").read_text()
        assert "process 1 read other data (4 batches" in message
        assert "no DistributedSampler" in message
