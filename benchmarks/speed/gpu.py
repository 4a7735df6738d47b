"""python -m benchmarks.speed gpu: everything on a GPU, in ten minutes: masks, speed, waits, memory.

Each check runs by itself, its errors included, and the figures are printed and written after each,
so that a run that is ended keeps what it found. `--device cpu` rehearses the program.

- masks: those of every method on the demo's models, next to those of the CPU: counts must be equal,
  and bits as far as the arithmetic is (what reads weights alone, all of them);
- waits: how often a batch, and a step of mask training, makes the CPU wait for the device;
- speed: MULTIFLOW over forward passes, SNIP over forward and backward, thresholds over one
  `torch.kthvalue`, with memory;
- resumed runs, statistics that change the device, two devices, deterministic algorithms, training
  with a lock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo import MODELS
from benchmarks.results import recorded
from benchmarks.speed.snip import bare_gradients
from benchmarks.speed.workload import bare_forward, best_in_turns, full_size, random_batches, timed
from vlp_adapters.xvlm.masking import mask_words
from vlp_plugins.calibration.batches import to_device
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import InputSecondMoment, MeanGradient, Statistic
from vlp_plugins.loading import load_model
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, prune

SPARSITIES = [0.63, 0.9]
TARGET = 1.10
"""Of MULTIFLOW over its forward passes, and of SNIP over its gradients."""
AGREEMENT = {
    "omp": 1.0, "random": 1.0, "l2": 0.99999, "lamp": 0.99999, "multiflow": 0.9995,
    "wanda": 0.9995, "snip": 0.998,
}  # fmt: skip
"""Least share of equal bits: activations and gradients are other numbers on a GPU."""
TRAINED = 0.95
"""The same for methods that go over the data again with what they found: errors grow."""
OPTIONS: dict[str, dict[str, Any]] = {
    "itersnip": {"rounds": 2}, "tamt": {"steps": 6}, "lamp-tamt": {"steps": 4},
    "chita": {"lambda": 1e-5}, "chita++": {"lambda": 1e-5, "rounds": 2},
}  # fmt: skip
Check = Callable[[torch.device], dict[str, Any]]


def demo(family: str, device: torch.device | str) -> tuple[nn.Module, Adapter]:
    """A small trained model, newly loaded."""
    return load_model(str(MODELS / family), device=str(device))


def demo_batches(family: str, count: int = 8, size: int = 6) -> list[Batch]:
    """Noise and random words with padding."""
    generator = torch.Generator().manual_seed(1)
    batches: list[Batch] = []
    for number in range(count):
        ids = torch.randint(6, 40, (size, 16), generator=generator)
        lengths = 8 + (torch.arange(size)[:, None] + number) % 8
        mask = (torch.arange(16) < lengths).long()
        ids = ids * mask
        ids[:, 0] = 2
        pixels = torch.randn(size, 3, 48, 48, generator=generator)
        batch: dict[str, Any] = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        if family == "xvlm":
            special = {0, 1, 2, 3, 4}
            words, labels = mask_words(
                ids, mask, mask_token_id=4, vocab_size=40, special_ids=special
            )
            batch |= {"mlm_input_ids": words, "mlm_labels": labels}
        batches.append(batch)
    return batches


def agreement(one: Masks, two: Masks) -> float:
    """Share of equal bits; 0 if the counts differ."""
    if one.removed != two.removed:
        return 0.0
    return 1 - sum(int((one[name] ^ two[name]).sum()) for name in one) / one.total


def masks(device: torch.device) -> dict[str, Any]:
    """Of every method on both demo models: as on the CPU, the model left as it was."""
    found: dict[str, Any] = {}
    names = registry().method_names()
    if device.type == "cpu":  # the rehearsal
        names = ["omp", "multiflow", "snip", "tamt"]
    for family in ("blip", "xvlm"):
        data = demo_batches(family)
        for name in names:
            try:
                found[f"{family} {name}"] = _masks_of(family, name, data, device)
            except Exception as error:  # one method that fails shall not hide the others
                found[f"{family} {name}"] = f"{type(error).__name__}: {error}"[:300]
    fine = [
        isinstance(share, float) and share >= AGREEMENT.get(name.split()[1], TRAINED)
        for name, share in found.items()
    ]
    return {**found, "ok": all(fine)}


def _masks_of(family: str, name: str, data: list[Batch], device: torch.device) -> float:
    options = {"method": name, "sparsity": SPARSITIES, **OPTIONS.get(name, {})}
    model, adapter = demo(family, "cpu")
    here = prune(model, data, adapter=adapter, **options)
    model, adapter = demo(family, device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    there = prune(model, data, adapter=adapter, **options)
    if not all(torch.equal(value, before[key]) for key, value in model.state_dict().items()):
        raise RuntimeError("the model was changed")
    return min(agreement(a, b) for a, b in zip(here, there, strict=True))


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """By line what waits for a CUDA device, as torch's own debug mode sees it."""
    waits: Counter[str] = Counter()
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if "synchroniz" in str(warning.message):
                    waits[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def waits(device: torch.device) -> dict[str, Any]:
    """What one batch more costs: of a pass, of gradients, of a step of mask training."""
    found: dict[str, Any] = {}
    for method, most in (("multiflow", 10), ("snip", 20), ("tamt", 30)):
        model, adapter = demo("blip", device)
        counts = []
        for count in (2, 3):
            with counted_waits(device) as seen:
                prune(model, demo_batches("blip", count), adapter=adapter, method=method,
                      sparsity=0.75)  # fmt: skip
            counts.append(seen)
        more = counts[1] - counts[0]
        found[method] = {"of a batch": more.total(), "where": dict(more.most_common(8))}
        found[method]["ok"] = more.total() <= most
    return {**found, "ok": all(each["ok"] for each in found.values())}


def _full(device: torch.device) -> tuple[nn.Module, Adapter, list[Batch]]:
    if device.type == "cpu":
        return *demo("blip", device), demo_batches("blip", 3, 4)
    model = full_size("blip", device)
    data = random_batches(10, 16, torch.device("cpu"))
    return model, registry().adapter_for(model), list(data)


def speed(device: torch.device) -> dict[str, Any]:
    """The data passes next to the work of the model; batches come from the CPU."""
    model, adapter, data = _full(device)
    weights = WeightMap.of(model, adapter)

    def passed(statistic: Statistic) -> Callable[[], object]:
        return lambda: calibrate(model, adapter, weights, data, [statistic])

    def there() -> list[Batch]:
        return [to_device(batch, device) for batch in data]

    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: bare_forward(model, adapter, there()),
        "multiflow pass": passed(InputSecondMoment()),
        "multiflow": lambda: prune(model, data, adapter=adapter, sparsity=[0.63, 0.75, 0.9]),
    }
    best_in_turns(model, runs, 1, device)  # kernels are chosen in the first round
    best = best_in_turns(model, runs, 3, device)
    model.requires_grad_(False)
    for weight in weights.values():
        weight.parameter.requires_grad_(True)
    runs = {
        "gradients": lambda: bare_gradients(model, adapter, there()),
        "snip pass": passed(MeanGradient()),
    }
    best_in_turns(model, runs, 1, device)
    best |= best_in_turns(model, runs, 2, device)
    seconds = {name: taken for name, (taken, _) in best.items()}
    ratios = {
        "multiflow_over_forward": seconds["multiflow pass"] / seconds["forward"],
        "snip_over_gradients": seconds["snip pass"] / seconds["gradients"],
    }
    extra = {name: most for name, (_, most) in best.items()}
    fine = device.type == "cpu" or max(ratios.values()) <= TARGET
    return {"seconds": seconds, "extra_peak_bytes": extra, **ratios, "ok": fine}


def thresholds(device: torch.device) -> dict[str, Any]:
    """Masks from weights alone, over one `kthvalue` of as many numbers; with their memory."""
    model, adapter, _ = _full(device)
    weights = WeightMap.of(model, adapter)
    scores = torch.cat([w.parameter.detach().flatten().abs() for w in weights.values()])
    runs: dict[str, Callable[[], Any]] = {
        "kthvalue": lambda: torch.kthvalue(scores, int(0.75 * len(scores)))
    }
    for name in ("omp", "lamp"):
        runs[name] = partial(prune, model, method=name, adapter=adapter, sparsity=0.75)
    best_in_turns(model, runs, 1, device)
    best = best_in_turns(model, runs, 2, device)
    seconds = {name: taken for name, (taken, _) in best.items()}
    extra = {name: most for name, (_, most) in best.items()}
    return {"elements": len(scores), "seconds": seconds, "extra_peak_bytes": extra, "ok": True}


def steps(device: torch.device) -> dict[str, Any]:
    """A step of mask training next to forward and backward of its batch."""
    model, adapter, data = _full(device)

    def taken(count: int) -> float:
        return timed(model, lambda: prune(model, data, method="tamt", adapter=adapter,
                                          sparsity=0.75, steps=count), device)[0]  # fmt: skip

    taken(1)
    one, many = taken(1), taken(4)
    there = [to_device(batch, device) for batch in data[:3]]
    bare_gradients(model, adapter, there)
    bare, _ = timed(model, lambda: bare_gradients(model, adapter, there), device)
    return {"step_seconds": (many - one) / 3, "gradients_seconds": bare / 3, "ok": True}


def runs(device: torch.device) -> dict[str, Any]:
    """A run that is resumed has the same bits; statistics of a device serve the CPU."""
    found: dict[str, Any] = {}
    model, adapter = demo("blip", device)
    data = demo_batches("blip")
    with tempfile.TemporaryDirectory() as folder:
        for method in ("multiflow", "snip"):
            options: dict[str, Any] = {"adapter": adapter, "method": method, "sparsity": 0.75}
            whole = prune(model, data, **options)
            file = Path(folder) / method
            prune(model, data, limit=4, checkpoint=file, **options)
            resumed = prune(model, data, checkpoint=file, resume=True, **options)
            found[f"{method} resumed"] = whole == resumed
        statistics = gather(model, data, adapter=adapter)
        there = prune(model, statistics=statistics, adapter=adapter, sparsity=0.75)
        model, adapter = demo("blip", "cpu")
        here = prune(model, statistics=statistics, adapter=adapter, sparsity=0.75)
        found["statistics agree"] = agreement(here, there) >= AGREEMENT["multiflow"]
    return {**found, "ok": all(found.values())}


def deterministic(device: torch.device) -> dict[str, Any]:
    """Every kind of method runs with `torch.use_deterministic_algorithms`, twice the same."""
    found: dict[str, Any] = {}
    data = demo_batches("blip")
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("omp", "lamp", "multiflow", "snip", "chita"):
            model, adapter = demo("blip", device)
            options = {"method": name, "sparsity": 0.75, **OPTIONS.get(name, {})}
            try:
                one = prune(model, data, adapter=adapter, **options)
                found[name] = one == prune(model, data, adapter=adapter, **options)
            except RuntimeError as error:
                found[name] = f"{error}"[:300]
    finally:
        torch.use_deterministic_algorithms(False)
    return {**found, "ok": all(value is True for value in found.values())}


def two_devices(device: torch.device) -> dict[str, Any]:
    """The vision tower on the CPU, the rest on the device, as a `device_map` places them."""
    from accelerate import dispatch_model

    found: dict[str, Any] = {}
    place = "cpu" if device.type == "cpu" else (device.index or 0)
    for method in ("omp", "lamp", "multiflow", "snip"):
        model, adapter = demo("blip", "cpu")
        expected = prune(model, demo_batches("blip"), method=method, adapter=adapter, sparsity=0.75)
        children = [name for name, _ in model.named_children()]
        own = [name for name, _ in model.named_parameters(recurse=False)]
        own += [name for name, _ in model.named_buffers(recurse=False)]
        places = {name: "cpu" if name.startswith("vision_model") else place for name in children}
        places |= dict.fromkeys(own, place)
        try:
            dispatch_model(model, places, main_device=place, force_hooks=True)
            there = prune(
                model, demo_batches("blip"), method=method, adapter=adapter, sparsity=0.75
            )
            found[method] = agreement(expected, there) >= AGREEMENT[method]
        except Exception as error:  # the others shall run
            found[method] = f"{type(error).__name__}: {error}"[:300]
    return {**found, "ok": all(value is True for value in found.values())}


def training(device: torch.device) -> dict[str, Any]:
    """Zeros stay zero in a few steps of a fused AdamW."""
    model, adapter = demo("blip", device)
    chosen = prune(model, method="omp", adapter=adapter, sparsity=0.75)
    chosen.apply(model)
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, fused=device.type == "cuda")
    with SparsityLock(model, chosen, adapter).attach(optimizer) as lock:
        for batch in demo_batches("blip", 3):
            losses = adapter.losses(model, to_device(batch, device))
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        lock.check()
    return {"violations": len(chosen.verify(model)), "ok": not chosen.verify(model)}


CHECKS: Sequence[Check] = (
    masks, waits, speed, thresholds, steps, runs, deterministic, two_devices, training
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Checks, prints and records after each; 1 without a GPU, or if a check found something."""
    device: torch.device = options.device
    if device.type == "cpu" and not options.rehearse:
        print("there is no GPU here: nothing was checked; --rehearse runs the program on the CPU")
        return 1
    if device.type == "cuda":
        # Numbers are compared with those of the CPU, where no product is rounded to TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begin, figures, said = time.monotonic(), {}, ""
    for check in CHECKS:
        name = check.__name__
        if name not in options.checks:
            continue
        if time.monotonic() - begin > options.seconds:
            print(f"{name}: left out, the time is over")
            continue
        start = time.monotonic()
        try:
            found = check(device)
        except Exception as error:
            where = traceback.format_exc(limit=-4)
            found = {"ok": False, "error": f"{type(error).__name__}: {error}", "where": where}
        found["taken"] = round(time.monotonic() - start, 1)
        figures[name] = found
        print(f"{name}: {'ok' if found['ok'] else 'NOT OK'} ({found['taken']:.0f} s)")
        print(json.dumps(found, indent=1, default=str), flush=True)
        said = recorded(f"gpu-{device.type}", figures, options.out)
    print(said)
    return int(not all(found["ok"] for found in figures.values()))
