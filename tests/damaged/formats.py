"""Every kind of file that is read: how one is damaged, and how a user reads it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

from click.testing import CliRunner

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("toys", "data", "adapters")]

import damage
import published_layouts
import tiny_models
import torch
from openai_clip import openai_state

import vlp_plugins as vlp
from vlp_plugins.cli.program import MENDABLE, explain, main
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.errors import VlpError

Write = Callable[[Random, Path], None]
Read = Callable[[Random, Path, Path], None]
Change = Callable[[Random, Path, Path], None]
"""Writes a damaged copy of a file."""


class Refused(Exception):
    """A command ended with one sentence."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: of it.
        share: how many there are of it for every file of a kind with a share of 1.
        write: puts a damaged one into a folder.
        read: a user's way to read it: from the folder, with results in another one. Raises
            `Refused` or `VlpError`, or what nobody expects.
        resumes: whether reading it may write into the folder where it lies.
    """

    name: str
    share: int
    write: Write
    read: Read
    resumes: bool = False


def command(*words: object) -> None:
    """Runs `vlp`, in this process.

    Raises:
        Refused: if it ends with an error that the user can mend.
        Exception: what it raises, if not.
    """
    result = CliRunner(env={"VLP_TRACEBACK": "1", "COLUMNS": "400"}).invoke(
        main, list(map(str, words))
    )
    error = result.exception
    if error is None or (isinstance(error, SystemExit) and result.exit_code in (0, 1)):
        return
    if isinstance(error, VlpError) or (
        hasattr(error, "exit_code") and explain(error)[1] == MENDABLE
    ):
        raise Refused(str(error)) from error
    raise error


@contextmanager
def interrupted(owner: Any, name: str, after: int) -> Iterator[None]:
    """Within it, Ctrl-C follows one of the calls of a method."""
    original, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        return found

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


class World:
    """Tiny models, data and results, whole, in a folder; each made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny_models.save_xvlm(folder / "xvlm")
        tiny_models.save_vit(folder / "vit")
        tiny_models.save_clip(folder / "clip")
        self.photos = tiny_models.save_photos(folder / "photos", 24)
        self.xvlm, self.vit, self.clip = (folder / name for name in ("xvlm", "vit", "clip"))

    @cached_property
    def model(self) -> Any:
        return vlp.load(self.xvlm, device="cpu")

    @cached_property
    def batches(self) -> list[Any]:
        return list(vlp.batches(self.photos, self.model, batch_size=6))

    @cached_property
    def masks(self) -> Path:
        path = self.folder / "masks.safetensors"
        vlp.prune(vlp.load(self.vit, device="cpu"), method="omp", sparsity=0.75).save(path)
        return path

    @cached_property
    def valued(self) -> Path:
        """Masks with new values."""
        model = vlp.load(self.xvlm, device="cpu")
        path = self.folder / "valued.safetensors"
        vlp.prune(model, self.batches, method="chita", sparsity=0.5, **{"lambda": 0.01}).save(path)
        return path

    @cached_property
    def statistics(self) -> Path:
        path = self.folder / "statistics.safetensors"
        vlp.gather(self.model, self.batches).save(path)
        return path

    @cached_property
    def profile(self) -> Path:
        path = self.folder / "id-profile.json"
        vlp.measure_id(self.model, self.batches).save(path)
        return path

    @cached_property
    def published(self) -> dict[str, torch.Tensor]:
        from vlp_plugins.masks.published_files import export_published
        from vlp_plugins.models.discovery import registry

        model = vlp.load(self.vit, device="cpu")
        adapter = registry().adapter_for(model)
        path, weights = self.folder / "published.pth", WeightMap.of(model, adapter)
        export_published(vlp.Masks.load(self.masks), path, weights, adapter)
        return dict(torch.load(path, weights_only=True))

    @cached_property
    def sparse(self) -> Path:
        folder = self.folder / "sparse"
        command("masks", "apply", self.masks, self.vit, "--sparse", "--out", folder)
        return folder

    @cached_property
    def structured(self) -> Path:
        from structured_examples import prepared, random_record

        from vlp_plugins.structured.cuts import cut
        from vlp_plugins.structured.files import save_structured

        model, adapter = prepared("blip retrieval")
        record = random_record(model, adapter)
        cut(model, adapter, record)
        save_structured(model, self.folder / "structured", record, adapter=adapter)
        return self.folder / "structured"

    @cached_property
    def trials(self) -> Path:
        from vlp_plugins.hosts.nni.best import TrialRecord

        for number in range(2):
            folder = self.folder / "trials" / f"t{number}"
            folder.mkdir(parents=True)
            settings = {"metric": "loss", "pairs": 4}
            drawn = {"sparsity": 0.5, "pruner": {"_name": "chita", "lambda": 0.1}}
            results = {
                0: {"default": 1.0, "loss": -1.0},
                5: {"default": 2.0 + number, "loss": -2.0},
            }
            TrialRecord(
                "exp", f"t{number}", number, drawn, settings, "omp", "0.5", 0.5, "loss", results
            ).save(folder)
        return self.folder / "trials"

    @cached_property
    def classifier(self) -> Path:
        """Of two classes, with a processor."""
        from transformers import ViTConfig, ViTForImageClassification

        shutil.copytree(self.vit, self.folder / "classifier")
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**tiny_models.VISION, num_labels=10))
        model.save_pretrained(self.folder / "classifier")
        return self.folder / "classifier"

    @cached_property
    def answering(self) -> Path:
        from vlp_adapters.xvlm import XvlmForQuestionAnswering

        shutil.copytree(self.xvlm, self.folder / "answering")
        model = XvlmForQuestionAnswering.from_pretraining(
            self.model, start_token_id=2, end_token_id=3
        )
        model.save_pretrained(self.folder / "answering")
        return self.folder / "answering"

    @cached_property
    def layouts(self) -> Path:
        """Published data sets, each in a folder by the name of what lays it out."""
        for name in (
            "karpathy_coco",
            "blip_coco",
            "vqa",
            "blip_vqa",
            "nlvr2",
            "cifar_10",
            "flowers",
        ):
            getattr(published_layouts, name)(self.folder / "layouts" / name)
        for path in (self.folder / "layouts" / "vqa").glob("*_test*"):
            path.unlink()  # one split is left
        return self.folder / "layouts"

    def unfinished(
        self, name: str, words: Sequence[object], owner: Any, method: str, after: int
    ) -> Path:
        """What a run leaves that is interrupted after so many calls of a method, in a folder."""
        folder = self.folder / "unfinished" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            runner = CliRunner()
            with interrupted(owner, method, after):
                result = runner.invoke(main, [*map(str, words), "--out", str(folder / "run")])
            assert result.exit_code == 130, (name, result.stderr)
        return folder


def formats(world: World) -> list[Format]:
    """All of them."""
    return [
        *_masks(world), *_measured(world), *_recipes(world), *_data(world), *_models(world),
        *_experiments(world), *_unfinished(world),
    ]  # fmt: skip


def _artifact(source: Callable[[], Path], name: str) -> Write:
    return lambda rng, folder: damage.write_damaged_artifact(rng, source(), folder / name)


def _masks(world: World) -> list[Format]:
    def read(model: Path, rng: Random, folder: Path, out: Path) -> None:
        file = folder / "masks.safetensors"
        command(*rng.choice((
            ("masks", "show", file), ("masks", "show", file, "--json"),
            ("masks", "diff", file, world.masks), ("masks", "diff", file, file, "--json"),
            ("masks", "invert", file, "--out", out / "x"), ("masks", "verify", file, model),
            ("masks", "apply", file, model, "--out", out / "x"),
            ("masks", "export", file, model, "--out", out / "x.pth"),
        )))  # fmt: skip

    def published(rng: Random, folder: Path, out: Path) -> None:
        command("masks", "import", folder / "x.pth", world.vit, "--out", out / "x")

    def pickled(rng: Random, folder: Path) -> None:
        damage.write_damaged_pickle(rng, world.published, folder / "x.pth")

    name = "masks.safetensors"
    return [
        Format("masks", 4, _artifact(lambda: world.masks, name), partial(read, world.vit)),
        Format(
            "masks with values", 2, _artifact(lambda: world.valued, name), partial(read, world.xvlm)
        ),
        Format("published masks", 4, pickled, published),
    ]  # fmt: skip


def _measured(world: World) -> list[Format]:
    def statistics(rng: Random, folder: Path, out: Path) -> None:
        found = vlp.Statistics.load(folder / "x.safetensors")
        repr(found)
        vlp.prune(world.model, statistics=found, sparsity=0.5)
        if rng.random() < 0.3:
            vlp.split_half(world.model, found, sparsity=0.5)

    def profile(rng: Random, folder: Path, out: Path) -> None:
        repr(vlp.IdProfile.load(folder / "x.json"))
        options = {"statistics": world.statistics, "id_profile": folder / "x.json"}
        vlp.prune(world.model, method="id*multiflow", sparsity=0.5, **options)

    def profile_report(rng: Random, folder: Path, out: Path) -> None:
        model, method = ("--model", world.xvlm), ("--method", "id*omp", "--sparsity", "0.5")
        words = ("--id-profile", folder / "x.json", "--device", "cpu", "--out", out / "x")
        command("prune", *model, *method, *words)

    def write(rng: Random, folder: Path) -> None:
        (folder / "x.json").write_bytes(damage.damaged_json(rng, world.profile.read_bytes()))

    return [
        Format("statistics", 4, _artifact(lambda: world.statistics, "x.safetensors"), statistics),
        Format("dimensions", 4, write, profile),
        Format("dimensions in a report", 1, write, profile_report),
    ]


_RECIPE = """model: {model}
method: omp
parameters: {{}}
sparsity: [0.5, {{vision: 0.5}}]
allocation: layer
floor: 0.01
data: {{source: {photos}, batch_size: 4, batches: 1, seed: 0, max_length: 8}}
seed: 0
save_model: false
checkpoint_every: 5
dtype: float32
device: cpu
variant: default
memory_budget: 1GiB
"""
_TUNING = """task: retrieval
learning_rate: 1.0e-4
weight_decay: 0.05
schedule: cosine
warmup: 0.1
betas: [0.9, 0.999]
batch_size: 4
steps: 1
accumulate: 1
clip: 1.0
seed: 0
"""
_SEARCH = """experimentName: x
searchSpace:
  pruner:
    _type: choice
    _value:
      - _name: omp
      - {{_name: chita, lambda: {{_type: loguniform, _value: [0.001, 1.0]}}}}
  sparsity: {{_type: quniform, _value: [0.5, 0.9, 0.1]}}
  data.batches: {{_type: randint, _value: [1, 3]}}
trialCommand: vlp nni-trial trial.yaml
trialCodeDirectory: {folder}
trialConcurrency: 1
maxTrialNumber: 3
tuner: {{name: TPE, classArgs: {{optimize_mode: maximize}}}}
trainingService: {{platform: local}}
"""


def _text(made: Callable[[], str], name: str) -> Write:
    def write(rng: Random, folder: Path) -> None:
        (folder / name).write_bytes(damage.damaged_yaml(rng, made().encode()))

    return write


def _recipes(world: World) -> list[Format]:
    def recipe() -> str:
        text = _RECIPE.format(model=world.vit, photos=world.photos)
        return text.replace("0.5, {vision: 0.5}", "0.5")

    def read(rng: Random, folder: Path, out: Path) -> None:
        if rng.random() < 0.7:
            command("plan", folder / "x.yaml", "--device", "cpu")
        else:
            command("prune", folder / "x.yaml", "--out", out / "x", "--device", "cpu")

    def tuning(rng: Random, folder: Path, out: Path) -> None:
        words = ("--recipe", folder / "x.yaml", "--data", world.photos, "--device", "cpu")
        few = ("--steps", "1", "--batch-size", "4")
        command("finetune", world.xvlm, *words, *few, "--out", out / "x")

    return [
        Format("recipe", 5, _text(recipe, "x.yaml"), read),
        Format("recipe of fine-tuning", 1, _text(lambda: _TUNING, "x.yaml"), tuning),
    ]


def _experiments(world: World) -> list[Format]:
    def trial(rng: Random, folder: Path) -> None:
        shutil.copytree(world.trials, folder / "exp")
        path = folder / "exp" / "t1" / "trial.json"
        path.write_bytes(damage.damaged_json(rng, path.read_bytes()))

    def best(rng: Random, folder: Path, out: Path) -> None:
        command("nni-best", folder / "exp", "--out", out / "x")

    def recipe(folder: Path) -> None:
        (folder / "trial.yaml").write_text(
            f"model: {world.xvlm}\nmethod: omp\nsparsity: 0.5\nout: {folder}/o\ndevice: cpu\n"
            f"data: {{source: {world.photos}, batch_size: 2, batches: 1}}\n"
        )

    def search(rng: Random, folder: Path) -> None:
        recipe(folder)
        text = _SEARCH.format(folder=folder).encode()
        (folder / "x.yaml").write_bytes(damage.damaged_yaml(rng, text))

    def check(rng: Random, folder: Path, out: Path) -> None:
        command("nni-trial", folder / "trial.yaml", "--check", folder / "x.yaml", "--pairs", "4")

    return [Format("trial.json", 3, trial, best), Format("search space", 2, search, check)]


def _data(world: World) -> list[Format]:
    def pairs(rng: Random, folder: Path, out: Path) -> None:
        list(vlp.batches(folder, world.model, batch_size=4))

    def measured(
        task: str, model: Callable[[], Path], rng: Random, folder: Path, out: Path
    ) -> None:
        words = ["evaluate", model(), "--task", task, "--data", folder, "--device", "cpu"]
        command(*words, *(["--beams", "1", "--longest", "3"] if task == "vqa" else []))

    def photos(folder: Path) -> list[dict[str, Any]]:
        rows = []
        for path in sorted(world.photos.glob("00[0-3].png")):
            shutil.copy(path, folder)
            rows.append({"file_name": path.name, "text": "a red", "label": len(rows) % 2,
                         "question": "a red", "answers": ["one", "two"]})  # fmt: skip
        return rows

    def jsonl(rng: Random, folder: Path) -> None:
        data = "\n".join(map(json.dumps, photos(folder))).encode()
        (folder / "metadata.jsonl").write_bytes(damage.damaged_lines(rng, data))

    def csv(rng: Random, folder: Path) -> None:
        rows = photos(folder)
        lines = [",".join(rows[0])] + [
            ",".join(map(str, list(row.values())[:4])) + ",one" for row in rows
        ]
        (folder / "metadata.csv").write_bytes(damage.damaged_csv(rng, "\n".join(lines).encode()))

    def image(rng: Random, folder: Path) -> None:
        rows = photos(folder)[:2]
        (folder / rows[0]["file_name"]).write_bytes(damage.damaged_image(rng))
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def shard(rng: Random, folder: Path) -> None:
        (folder / "x.tar").write_bytes(damage.damaged_shard(rng))

    def layout(name: str, rng: Random, folder: Path) -> None:
        shutil.copytree(world.layouts / name, folder, dirs_exist_ok=True)
        files = (
            *folder.rglob("*.json"),
            *folder.rglob("*.mat"),
            *folder.rglob("*.bin"),
            *folder.rglob("*.txt"),
        )
        path = rng.choice(sorted(files))
        change = damage.damaged_bytes
        if path.suffix == ".json":
            lines = name == "nlvr2" and path.parent.name == "data"
            change = damage.damaged_lines if lines else damage.damaged_json
        path.write_bytes(change(rng, path.read_bytes()))

    def listed(rng: Random, folder: Path, out: Path) -> None:
        list(vlp.batches(folder, world.model, batch_size=4, split="test"))

    def statements(rng: Random, folder: Path, out: Path) -> None:
        from vlp_plugins.data.nlvr2 import open_nlvr2

        for statement in open_nlvr2(folder, rng.choice(("dev", "train", "test"))):
            for each in (statement.image, statement.second):
                each()

    vit = partial(measured, "classification", lambda: world.classifier)
    vqa = partial(measured, "vqa", lambda: world.answering)
    return [
        Format("metadata.jsonl", 5, jsonl, pairs),
        Format("metadata.csv", 3, csv, pairs),
        Format("images", 6, image, pairs),
        Format("tar shards", 6, shard, pairs),
        Format("labels in metadata.jsonl", 1, jsonl, vit),
        Format("labels in metadata.csv", 1, csv, vit),
        Format("questions in metadata.jsonl", 1, jsonl, vqa),
        Format("Karpathy's splits", 2, partial(layout, "karpathy_coco"), pairs),
        Format("lists of captions", 2, partial(layout, "blip_coco"), listed),
        Format("VQAv2", 1, partial(layout, "vqa"), vqa),
        Format("lists of questions", 1, partial(layout, "blip_vqa"), vqa),
        Format("NLVR2", 2, partial(layout, "nlvr2"), statements),
        Format("CIFAR", 1, partial(layout, "cifar_10"), vit),
        Format("Flowers-102", 1, partial(layout, "flowers"), vit),
    ]


def _models(world: World) -> list[Format]:
    def copied(
        source: Callable[[], Path],
        change: Change,
        names: Sequence[str],
        rng: Random,
        folder: Path,
    ) -> None:
        name = rng.choice(names)
        shutil.copytree(source(), folder / "model")
        change(rng, source() / name, folder / "model" / name)

    def value(rng: Random, source: Path, target: Path) -> None:
        target.write_bytes(damage.damaged_json(rng, source.read_bytes()))

    def config(rng: Random, source: Path, target: Path) -> None:
        if rng.random() < 0.3:
            (target.parent / "model.safetensors").unlink()
        value(rng, source, target)

    def look(rng: Random, folder: Path, out: Path) -> None:
        command("inspect", folder / "model", *rng.choice(((), ("--json",), ("--weights",))))

    def state(rng: Random, folder: Path) -> None:
        name = rng.choice(("model.pth", "model.pt", "model.bin"))
        damage.write_damaged_pickle(rng, openai_state(), folder / name)

    def checkpoint(rng: Random, folder: Path, out: Path) -> None:
        (path,) = folder.iterdir()
        command("inspect", path)

    def folder_of(rng: Random, folder: Path) -> None:
        shutil.copytree(world.clip, folder / "model")
        (folder / "model" / "model.safetensors").unlink()
        _, tensors = damage.read_header(world.clip / "model.safetensors")
        damage.write_damaged_pickle(rng, tensors, folder / "model" / "pytorch_model.bin")

    def processor(rng: Random, folder: Path, out: Path) -> None:
        list(
            vlp.batches(
                world.photos, world.model, batch_size=12, count=1, processor=folder / "model"
            )
        )

    def of(source: Callable[[], Path], change: Change, *names: str) -> Write:
        """Damages one of some files in a copy of a folder."""
        return partial(copied, source, change, names)

    tensors, xvlm = damage.write_damaged_artifact, lambda: world.xvlm
    sparse, structured = (lambda: world.sparse), (lambda: world.structured)
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    plain = {"vit": lambda: world.vit, "clip": lambda: world.clip, "xvlm": xvlm}
    return [
        *(
            Format(f"config.json ({name})", 3, of(source, config, "config.json"), look)
            for name, source in plain.items()
        ),
        *(
            Format(f"safetensors ({name})", 2, of(source, tensors, "model.safetensors"), look)
            for name, source in plain.items()
        ),
        Format("checkpoint file", 4, state, checkpoint),
        Format("pytorch_model.bin", 2, folder_of, look),
        Format("sparse checkpoint", 4, of(sparse, tensors, "vlp_sparse.safetensors"), look),
        Format("structured record", 3, of(structured, value, "vlp_structure.json"), look),
        Format(
            "structured values", 2, of(structured, tensors, "vlp_structured.safetensors"), look
        ),
        Format("structured configuration", 2, of(structured, value, "config.json"), look),
        Format("processor", 2, of(xvlm, value, "preprocessor_config.json"), processor),
        Format("tokenizer", 2, of(xvlm, value, *tokenizer), processor),
    ]  # fmt: skip


def _unfinished(world: World) -> list[Format]:
    from vlp_plugins.tasks.sensitivity.files import PointsFile

    data = ["--data", world.photos, "--batch-size", "6", "--device", "cpu"]
    prune = ["prune", "--model", world.xvlm, "--sparsity", "0.5", *data, "--method"]
    few = [*data, "--sparsity", "0.5"]
    steps = ["--checkpoint-every", "1"]
    tuned = ["finetune", world.xvlm, "--task", "retrieval", *data, "--steps", "4", "--log-every", 1]
    points = ["sensitivity", world.xvlm, *few, "--by", "modality", "--pairs", "12"]
    cells = ["compare", world.xvlm, *few, "--task", "loss", "--methods", "omp", "l2"]
    stages = [*prune, "chita++", "--lambda", "0.01", "--parameter", "rounds=3"]
    runs: dict[str, tuple[list[object], Any, str, int]] = {
        "a data pass": ([*prune, "multiflow", *steps], Checkpoint, "save", 2),
        "a pass of gradients": ([*prune, "snip", *steps], Checkpoint, "save", 2),
        "rounds": ([*prune, "itersnip", "--parameter", "rounds=3"], Checkpoint, "save", 2),
        "stages": (stages, Checkpoint, "save", 2),
        "training": ([*prune, "platon", "--parameter", "steps=6"], Checkpoint, "save", 1),
        "dimensions": (["id", world.xvlm, *data], Checkpoint, "save", 1),
        "fine-tuning": ([*tuned, "--checkpoint-every", "2"], Checkpoint, "save", 1),
        "points": (points, PointsFile, "add", 2),
        "cells": (cells, Checkpoint, "save", 2),
    }
    return [
        Format(
            f"unfinished: {name}", 1, partial(_interrupted, world, name, run),
            partial(_resume, run[0]), resumes=True,
        )
        for name, run in runs.items()
    ]  # fmt: skip


def _interrupted(world: World, name: str, run: tuple[Any, ...], rng: Random, folder: Path) -> None:
    shutil.copytree(world.unfinished(name, *run), folder, dirs_exist_ok=True)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".txt"]
    path = rng.choice(files)
    source = world.folder / "unfinished" / name / path.relative_to(folder)
    if path.suffix == ".jsonl":
        path.write_bytes(damage.damaged_lines(rng, source.read_bytes()))
    elif path.suffix == ".json":
        path.write_bytes(damage.damaged_json(rng, source.read_bytes()))
    else:
        damage.write_damaged_artifact(rng, source, path)


def _resume(words: list[object], rng: Random, folder: Path, out: Path) -> None:
    command(*words, "--out", folder / "run", "--resume")
