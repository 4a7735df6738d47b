"""Every block of code in README.md and docs/ runs, in the order of its page, or says why not.

Blocks of a page share one folder, with small models and pictures by the names that the pages use,
and one namespace. A block whose first line is `# not run by the tests: REASON` is left out.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "cli"))

# Pages whose blocks have tests of their own, and by which file.
ELSEWHERE = {
    "docs/howto": "test_howto.py",
    "docs/python.md": "test_python_pages.py",
    "docs/quickstart.md": "test_python_pages.py",
}
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if not any(str(path.relative_to(ROOT)).startswith(place) for place in ELSEWHERE)
]
SHOWS_OUTPUT = {
    "README.md",
    "tutorial-chat.md",
}  # blocks of text are what the command before them printed
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"# not run by the tests: (\S.{10,})\n")
FILE = re.compile(r"# ([\w./-]+\.(?:yaml|toml|py|jsonl))\n")


def given(page, world):
    """What a page says is yours: a model, batches, a loader, a data set."""
    from vlp_plugins.loading import load_model

    torch.manual_seed(0)
    classified = {"pixel_values": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 3}
    rows = [{name: value[row] for name, value in classified.items()} for row in range(8)]
    if page == "finetuning.md":
        return {"loader": [classified] * 6, "train_dataset": rows}
    if page == "nni.md":
        model, _ = load_model(str(world / "my-classifier"))
        return {"model": model, "batches": [classified] * 2, "train_dataset": rows}
    return {}


def blocks_of(path):
    """Language, code and line of every block."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        indent, language, code = found.groups()
        line = text.count("\n", 0, found.start()) + 1
        yield language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE), line


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def check_shown(shown, printed, where):
    """What a page shows was printed, with about the same figures: processors round differently."""
    words, among = (re.sub(r"\bbest\b|\bas good\b", "", text).split() for text in (shown, printed))
    bare = [NUMBER.sub("#", word) for word in words]
    for start in range(len(among) - len(words) + 1):
        found = among[start : start + len(words)]
        if [NUMBER.sub("#", word) for word in found] == bare:
            break
    else:
        pytest.fail(f"{where}: not printed:\n{shown}\nbut\n{printed}")
    pairs = zip(NUMBER.findall(" ".join(words)), NUMBER.findall(" ".join(found)), strict=True)
    assert all(abs(float(one) - float(other)) <= 1.5 for one, other in pairs), f"{where}: {found}"


def run_shell(code, where):
    """What lines of `vlp` and `python -m` print; any other needs a reason not to be run."""
    from vlp_plugins.cli.program import main

    printed = ""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[:2] == ["python", "-m"]:
            subprocess.run([sys.executable, *words[1:]], check=True)
            continue
        assert words[0] == "vlp", f"{where}: only vlp is run, not {line!r}: give a reason"
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, f"{where}: {line}\n{result.output}\n{result.exception!r}"
        printed = result.stdout
    return printed


def run_block(language, code, where, names):
    """Runs one block as its language asks; a first line with a file's name writes that file."""
    if NOT_RUN.match(code):
        return ""
    if named := FILE.match(code):
        Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(named[1]).write_text(code, encoding="utf-8")
    if language == "python":
        exec(compile(code, where, "exec"), names)
    elif language == "sh":
        return run_shell(code, where)
    elif language == "yaml":
        assert yaml.safe_load(code), where
    elif language == "toml":
        assert tomllib.loads(code), where
    else:
        assert language == "text", f"{where}: a block of {language or 'no language'}"
    return ""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folders that the pages speak of."""
    import chat_models
    import task_models
    import tiny_models

    folder = tmp_path_factory.mktemp("world")
    chat_models.save_llava(folder / "my-chat")
    tiny_models.save_clip(folder / "my-clip")
    tiny_models.save_blip(folder / "my-blip")
    tiny_models.save_vit(folder / "my-vit")
    task_models.save_classifier(folder / "my-classifier")
    tiny_models.save_photos(folder / "photos", 40)
    tiny_models.save_photos(folder / "photos-test", 12)
    task_models.save_classes(folder / "photos-by-class")
    task_models.save_coco(folder / "coco")
    task_models.save_questions(folder / "questions")
    return folder


def check_finetuning(names):
    masks = names["masks"]
    assert masks.removed == int(0.75 * (masks.kept + masks.removed))
    assert masks.verify(names["model"]) == []


def check_structured(names):
    assert names["result"].parameters_after < names["result"].parameters_before
    assert names["smaller"].num_parameters() == names["result"].parameters_after
    assert names["plain"].num_parameters() == names["result"].parameters_before


def check_torch_pruning(names):
    from transformers import CLIPModel

    dense = CLIPModel.from_pretrained("my-clip")
    assert names["model"].num_parameters() < dense.num_parameters()


def check_plugins(names):
    from vlp_plugins.extend import Evidence

    scorer = names["vlp_scorers"]()["square"]()
    assert scorer.score(torch.tensor([[-2.0]]), Evidence("w")).tolist() == [[4.0]]
    assert names["masks"].sparsity == 0.5


def check_readme(names):
    from vlp_plugins import Masks

    masks = names["masks"]
    assert masks.removed == int(0.75 * (masks.kept + masks.removed))
    assert Masks.load("masks.safetensors") == masks
    assert names["result"].parameters_after < names["result"].parameters_before


AFTER = {
    "README.md": check_readme,
    "finetuning.md": check_finetuning,
    "structured.md": check_structured,
    "torch-pruning.md": check_torch_pruning,
    "plugins.md": check_plugins,
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_runs(path, world, tmp_path, monkeypatch):
    blocks = list(blocks_of(path))
    if all(language == "text" or NOT_RUN.match(code) for language, code, _ in blocks):
        return
    here = tmp_path / "here"
    shutil.copytree(world, here)
    (here / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    names = {"__name__": "page", **given(path.name, here)}
    printed = ""
    for language, code, line in blocks:
        where = f"{path.relative_to(ROOT)}:{line}"
        if language == "text" and path.name in SHOWS_OUTPUT:
            check_shown(code, printed, where)
        printed = run_block(language, code, where, names)
    if check := AFTER.get(path.name):
        check(names)


def test_pages_that_are_left_out_have_a_test_of_their_own():
    for place, test in ELSEWHERE.items():
        name = Path(place).stem
        assert name in (ROOT / "tests" / test).read_text(encoding="utf-8"), test


def test_a_block_that_fails_is_found(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    for language, code, error in (
        ("python", "1 / 0\n", ZeroDivisionError),
        ("sh", "vlp inspect no-such-folder\n", AssertionError),
        ("sh", "make demo\n", AssertionError),
        ("", "vlp\n", AssertionError),
        ("yaml", "a: [\n", yaml.YAMLError),
    ):
        with pytest.raises(error):
            run_block(language, code, "here", {})
    check_shown("b  5.0 best\n", "a 1\nb  6.0\n", "here")
    for shown in ("b 9.0\n", "c 5.0\n"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_shown(shown, "a 1\nb 5.0\n", "here")
