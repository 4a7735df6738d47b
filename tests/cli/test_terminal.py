"""What appears on the terminal beside results: a bar, warnings, and no library's chatter."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import recipe_options
from vlp_plugins.cli.terminal import data_progress, print_table, quiet_libraries, show_log


def parsed(*words: str) -> dict[str, object]:
    """The parameters that click makes of the words of `vlp prune`."""
    command = recipe_options(Command("prune", params=[]))
    return command.make_context("prune", list(words)).params


@pytest.mark.parametrize(
    ("words", "sparsity", "recipe"),
    [
        (["--sparsity", "0.1", "0.2", "0.3"], ("0.1", "0.2", "0.3"), None),
        (["--sparsity=0.1", "0.2", "--model", "m"], ("0.1", "0.2"), None),
        (["--sparsity", "0.1", "--sparsity", "0.2"], ("0.1", "0.2"), None),
        (["r.yaml", "--sparsity", "0.1", "0.2"], ("0.1", "0.2"), "r.yaml"),
        (["--sparsity", "0.1", "0.2", "r.yaml"], ("0.1", "0.2"), "r.yaml"),
        (["--sparsity", "-0.1", "--seed", "1"], ("-0.1",), None),
        (["--sparsity", "vision=0.5,text=0.8", "0.2"], ("vision=0.5,text=0.8", "0.2"), None),
    ],
)
def test_an_option_takes_several_values(words, sparsity, recipe) -> None:
    found = parsed(*words)
    assert found["sparsity"] == sparsity
    assert found["recipe"] == (Path(recipe) if recipe else None)


def test_the_bar_shows_batches_and_the_time_left(monkeypatch) -> None:
    screen: list[Console] = []

    def console(*_: object, **__: object) -> Console:
        options = {"force_terminal": True, "width": 100, "record": True}
        screen.append(Console(file=io.StringIO(), **options))
        return screen[0]

    monkeypatch.setattr("rich.console.Console", console)
    with data_progress(shown=True) as progress:
        for done in range(1, 6):
            progress(done, 8)
    text = screen[0].export_text()
    assert re.search(r"reading data .*5/8 batches, passed 0:00:0\d left 0:00:0\d", text)


@pytest.mark.parametrize("shown", [True, False])
def test_no_bar_where_nobody_looks(capsys, shown) -> None:
    with data_progress(shown=shown) as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


def test_warnings_of_ours_are_one_line(capsys) -> None:
    before = logging.getLogger().handlers[:]
    try:
        show_log()
        show_log()
        logging.getLogger("vlp_plugins.anything").warning("two\nlines of %s", "text")
        logging.getLogger("vlp_plugins.anything").info("nothing")
        assert capsys.readouterr().err == "warning: two lines of text\n"
    finally:
        logging.getLogger().handlers[:] = before


def test_libraries_are_silent_but_the_users_wish_counts(monkeypatch) -> None:
    importlib.import_module("transformers")  # what the command finds when it is run from Python
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS") == "1"
    assert logging.getLogger("transformers").level == logging.ERROR


def test_nothing_but_results_on_a_run_without_mistakes(vlp, xvlm, photos, tmp_path) -> None:
    """`vlp` runs in this process, where transformers is imported and would chatter."""
    words = ("--model", xvlm, "--sparsity", "0.5", "--data", photos, "--save-model")
    assert vlp("prune", *words, "--out", tmp_path / "o").stderr == ""


# --- signals ---

SWALLOWING = """
import signal, sys, time
import click
from vlp_plugins.cli.program import Program
from vlp_plugins.cli.program import explained_interruption

@click.group(cls=Program)
def main(): pass

@main.command()
def work():
    with explained_interruption("vlp work", lambda: True, shown=True):
        try:
            signal.raise_signal(int(sys.argv[1]))
        except KeyboardInterrupt:
            if sys.argv[2] == "saves":
                time.sleep(1.5)
                print("saved", flush=True)
                raise
        time.sleep(60)

main(["work"])
"""


@pytest.mark.parametrize("ends", ["swallows", "saves"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_though_a_library_swallows_it_and_saving_is_not_cut_short(
    number, ends
) -> None:
    words = [sys.executable, "-c", SWALLOWING, str(int(number)), ends]
    found = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == 128 + number, found.stderr
    assert found.stderr == "interrupted; to resume: vlp work --resume\n"
    assert ("saved" in found.stdout) == (ends == "saves")


def test_handlers_of_signals_are_those_of_before_after_a_command(vlp) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    vlp("plugins")
    assert [signal.getsignal(number) for number in numbers] == before


# --- how much is said ---


def test_quiet_leaves_results_and_errors(vlp, xvlm, photos, tmp_path) -> None:
    """Layers of the tiny model lose everything at 99.9%, which is a warning."""
    words = ["prune", "--model", xvlm, "--method", "omp", "--sparsity", "0.999", "--out"]
    loud = vlp(*words, tmp_path / "loud")
    quiet = vlp(*words, tmp_path / "quiet", "-q")
    assert "warning: " in loud.stderr
    assert re.search("^loading: ", loud.stdout, re.MULTILINE)
    assert quiet.stderr == ""
    assert not re.search("^loading: ", quiet.stdout, re.MULTILINE)
    table = loud.stdout.split("\n\n")[0]
    assert quiet.stdout == f"{table}\n\nwritten: {tmp_path / 'quiet'}\n"
    assert vlp("--quiet", *words, tmp_path / "before").stderr == ""
    assert vlp(*words, tmp_path / "quiet", "--quiet", code=2).stderr.startswith("error: folder ")


def test_verbose_shows_every_step_and_only_that_command(vlp, xvlm, photos, tmp_path) -> None:
    words = ["prune", "--model", xvlm, "--method", "itersnip", "--parameter", "rounds=2",
             "--sparsity", "0.5", "--data", photos, "--batch-size", "3", "--out"]  # fmt: skip
    found = vlp(*words, tmp_path / "a", "-v").stderr
    assert len(re.findall("^info: itersnip: round . of 2: ", found, re.MULTILINE)) == 2
    assert vlp("-v", *words, tmp_path / "b").stderr == found
    plain = vlp(*words, tmp_path / "c").stderr
    assert len(re.findall("^itersnip: round . of 2: ", plain, re.MULTILINE)) == 2
    assert "info: " not in plain
    assert vlp("-q", *words, tmp_path / "d").stderr == ""


# --- tables ---


def test_a_table_is_as_wide_as_the_terminal_and_nothing_is_cut(capsys, monkeypatch) -> None:
    header = ["name", "elements", "of them shared by others", "path"]
    row = ["two words", "1,234,567", "8", "encoder.layer.0.attention.self.query.weight"]
    monkeypatch.setenv("COLUMNS", "50")
    print_table("", header, [row])
    narrow = capsys.readouterr().out.splitlines()
    assert max(map(len, narrow)) <= 50
    shown = "".join("".join(narrow).split())
    assert sorted(shown) == sorted("".join([*header, *row]).replace(" ", ""))
    assert any(line.endswith("  encoder.layer.0.") for line in narrow)  # broken after a dot
    print_table("", header, [["a_name_that_is_copied", *row[1:]]], names=True)
    assert "a_name_that_is_copied  " in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "100")
    print_table("", header, [row])
    assert capsys.readouterr().out.splitlines()[1] == f"two words  1,234,567{'8':>26}  {row[-1]}"
    monkeypatch.setenv("COLUMNS", "20")  # numbers and narrow columns stay as they are
    print_table("", ["n", "m"], [["1" * 15, "2" * 15]])
    assert capsys.readouterr().out.splitlines()[1] == f"{'1' * 15}  {'2' * 15}"
