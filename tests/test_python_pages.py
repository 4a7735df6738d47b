"""The pages that show Python: every block runs as it stands and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import CliRunner

import vlp_plugins
from benchmarks.demo.build_data import build
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
TOLERANCE = 1.5
"""Of figures in percent: another kind of CPU may rank a query otherwise."""


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def training_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a reader's own loop has: here the pre-training loss."""
    return sum(registry().adapter_for(model).losses(model, batch).values())


def check_printed(printed: str, shown: str) -> None:
    """The same words, and about the same numbers."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    numbers = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    for one, other in numbers:
        difference = abs(float(one.replace(",", "")) - float(other.replace(",", "")))
        assert difference <= TOLERANCE, printed


def run_blocks(page: str, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the Python blocks one after the other; `text` is what the one before it prints."""
    printed = ""
    for language, code in blocks_of(page):
        if language == "python":
            exec(compile(code, page, "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text":
            check_printed(printed, code)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `docs/python.md` assumes: `model-folder`, `photos`, `photos-test`."""
    build(tmp_path, calibration=64, downstream=0, test=40)
    (tmp_path / "calibration").rename(tmp_path / "photos")
    (tmp_path / "test").rename(tmp_path / "photos-test")
    (tmp_path / "model-folder").symlink_to(ROOT / "benchmarks" / "demo" / "models" / "blip")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_of_python_runs_from_top_to_bottom(folders, capsys) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"training_loss": training_loss}
    run_blocks("python.md", names, capsys)
    pruned = vlp_plugins.load(folders / "pruned", device="cpu")
    assert len(vlp_plugins.batches(folders / "photos", pruned)) == 2, "the folder is complete"


def test_the_quick_start_runs_word_by_word(tmp_path, monkeypatch, capsys) -> None:
    from vlp_plugins.cli.program import main

    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    first, *_, last = (code for language, code in blocks_of("quickstart.md") if not language)
    (write,) = [line for line in first.splitlines() if line.startswith("python ")]
    subprocess.run([sys.executable, *write.split()[1:]], check=True)
    run_blocks("quickstart.md", {}, capsys)
    for line in last.splitlines():
        result = CliRunner().invoke(main, line.split()[1:])
        assert result.exit_code == 0, result.output
    made = Masks.load("masks.safetensors")
    assert made == Masks.load("pruned-by-command/masks-0.75.safetensors")
    assert made.verify(vlp_plugins.load("pruned-again", device="cpu")) == []
    assert made.verify(vlp_plugins.load("pruned", device="cpu")) == []


EXAMPLES = [name for name in vlp_plugins.__all__ if name not in ("__version__", "hookimpl")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_every_public_name_runs(name, models, tmp_path, monkeypatch) -> None:
    (tmp_path / "model-folder").symlink_to(models / "blip")
    tiny_models.save_photos(tmp_path / "photos", 24)
    for folder in ("photos-test", "drawings"):
        (tmp_path / folder).symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    model = vlp_plugins.load("model-folder", device="cpu")
    data = vlp_plugins.batches("photos", model, batch_size=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for batch in list(data)[:1] * steps:
            training_loss(model, batch).backward()
            optimizer.step()

    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    names = {"vlp": vlp_plugins, "torch": torch, "model": model, "data": data, "masks": masks,
             "optimizer": optimizer, "train": train}  # fmt: skip
    documented = getattr(vlp_plugins, name).__doc__
    found = re.search(r"^( *)Example:\n((?:\1 {4}.*\n)+)", documented, re.MULTILINE)
    assert found, f"{name} has no example"
    exec(textwrap.dedent(found[2]).replace("10_000", "10"), names)


def test_the_package_lists_its_public_names() -> None:
    assert dir(vlp_plugins) == sorted(vlp_plugins.__all__)
    for name in vlp_plugins.__all__:
        assert name == "__version__" or f"`{name}`" in vlp_plugins.__doc__, name


def test_the_example_of_the_package_runs(folders, capsys) -> None:
    (code,) = re.findall(r"\n((?:    .*\n|\n)+)", vlp_plugins.__doc__)
    exec(textwrap.dedent(code), {})
    assert capsys.readouterr().out.startswith("retrieval on photos-test\n")
    assert (folders / "masks.safetensors").is_file()
