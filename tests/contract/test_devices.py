"""Models that are on devices, which are pretended: nothing meets across them, little waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from pretend_device import PretendDevices
from test_methods import QUICK
from torch import nn

from benchmarks.parity import blip, xvlm
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import NonFiniteError

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = {"blip": blip, "xvlm": xvlm}
VISION = ("vision_model", "vision_model_m", "vision_encoder")


def given(family: str, count: int = 3) -> tuple[nn.Module, list[Batch]]:
    made = FAMILIES[family]
    folder = GOLDEN / family
    return made.model_from_golden(folder), list(made.batches_from_golden(folder))[:count]


SLOW = ("alps+",)  # as alps, on a solution of alps


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.long if name == "alps" else ())
        for name in registry().method_names()
        if name not in SLOW
    ]
    + [pytest.param("chita by blocks", marks=pytest.mark.long)],
)
def test_masks_of_a_device_are_those_of_the_cpu(method):
    options = {"method": method, "sparsity": 0.5, **QUICK.get(method, {})}
    if method == "chita by blocks":
        options = {"method": "chita", "sparsity": 0.5, "walk": "blocks"}
    model, batches = given("blip")
    expected = prune(model, batches, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with PretendDevices().active() as devices:
        model.to("xpu:0")
        found = prune(model, batches, **options)
        assert {str(devices.place(p)) for p in model.parameters()} == {"xpu:0"}

    assert found == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def place_towers(model: nn.Module, places: Callable[[str], str]) -> None:
    """Every child of the model on a device, and what it reads moved there, as accelerate does."""

    def moved(module: nn.Module, args: Any, kwargs: Any) -> Any:
        device = next(module.parameters()).device
        return send_to_device(args, device), send_to_device(kwargs, device)

    for name, child in model.named_children():
        child.to(places(name))
        for module in child.modules():
            if any(True for _ in module.parameters()):
                module.register_forward_pre_hook(moved, with_kwargs=True)
    for name, parameter in model.named_parameters(recurse=False):
        parameter.data = parameter.data.to(places(name))
    for name, buffer in list(model.named_buffers(recurse=False)):
        model._buffers[name] = buffer.to(places(name))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["omp", "lamp", "multiflow", "wanda", "snip", "tamt"])
def test_a_model_may_be_on_two_devices(family, method):
    model, batches = given(family)
    expected = prune(model, batches, method=method, sparsity=0.5)

    with PretendDevices().active():
        place_towers(model, lambda name: f"xpu:{int(name in VISION)}")
        assert len({parameter.device for parameter in model.parameters()}) == 2
        found = prune(model, batches, method=method, sparsity=0.5)

    assert found == expected


def waits_of_a_batch(run: Callable[[nn.Module, list[Batch]], object], family: str) -> int:
    """How often one batch more waits for the device."""
    counts = []
    for count in (2, 3):
        model, batches = given(family, count)
        with PretendDevices().active() as devices:
            model.to("xpu:0")
            devices.waits.clear()
            run(model, batches)
        counts.append(devices.waits.total())
    return counts[1] - counts[0]


def run_streams(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        there = send_to_device(batch, "xpu:0")
        with torch.no_grad():
            for stream in registry().adapter_for(model).streams(model, there):
                stream.run()


def run_losses(model: nn.Module, batches: list[Batch]) -> None:
    adapter = registry().adapter_for(model)
    leaves = [weight.parameter for weight in WeightMap.of(model, adapter).values()]
    for batch in batches:
        losses = adapter.losses(model, send_to_device(batch, "xpu:0"))
        total = torch.stack([term.reshape(()) for term in losses.values()]).sum()
        torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize(
    ("family", "method", "bare", "most"),
    [
        # One for each mask of tokens, one for all sums; the decoder's mask is another one.
        ("blip", "multiflow", run_streams, 2 + 1),
        ("xvlm", "multiflow", run_streams, 1 + 1),
        # Whether the losses are finite, whether the gradients are.
        ("blip", "snip", run_losses, 2),
        ("xvlm", "snip", run_losses, 2),
        # The same, how large the gradients are, and five for the masks.
        ("blip", "tamt", run_losses, 2 + 1 + 5),
        ("xvlm", "tamt", run_losses, 2 + 1 + 5),
    ],
)
def test_syncs_of_a_batch_are_those_of_the_model_and_a_few(family, method, bare, most):
    def run(model: nn.Module, batches: list[Batch]) -> object:
        return prune(model, batches, method=method, sparsity=0.5)

    assert 0 < waits_of_a_batch(run, family) - waits_of_a_batch(bare, family) <= most


def test_a_pretended_device_refuses_what_devices_refuse():
    with PretendDevices().active() as devices:
        here, there = torch.ones(3), torch.ones(3).to("xpu:0")
        assert str(there.device) == "xpu:0"
        assert (there + 1).device == there.device
        assert devices.waits.total() == 0
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert bool(there.all())
        assert len(there[there > 0]) == 3
        assert torch.equal(there.cpu(), here)
        assert devices.waits.total() == 3


def test_a_gradient_on_a_device_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    adapter = ModuleAdapter(model, loss=lambda model, batch: model(batch).abs().sum().sqrt())
    with PretendDevices().active():
        model.to("xpu:0")
        with pytest.raises(NonFiniteError, match="gradient of weight '0'.* has 12 NaN"):
            prune(model, [torch.zeros(2, 4)], adapter=adapter, method="snip", sparsity=0.5)
