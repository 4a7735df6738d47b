"""How many files of ours a call enters: `python tests/files_entered.py`.

Prints one line each for `prune` with MULTIFLOW, with CHITA, and for `vlp prune`: the files whose
functions were called (bodies of modules and classes, which run on import, do not count), and then
their names with `--names`. A facade that only imports is not entered.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def entered(function: Callable[[], object]) -> list[str]:
    """The files of vlp_plugins with a function that ran."""
    package = str(ROOT / "vlp_plugins")
    found: set[str] = set()

    def note(frame, event, _):  # type: ignore[no-untyped-def]
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
        if event == "call" and is_function and code.co_filename.startswith(package):
            found.add(code.co_filename)

    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function()
    finally:
        sys.setprofile(None)
    return sorted(str(Path(name).relative_to(ROOT)) for name in found)


def main() -> None:
    """Runs the three calls on the recorded BLIP and on tiny models."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toys")]
    import tiny_models
    from click.testing import CliRunner

    from benchmarks.parity.blip import batches_from_golden, model_from_golden
    from vlp_plugins import prune
    from vlp_plugins.cli import main as vlp

    golden = ROOT / "tests" / "golden" / "blip"
    model, batches = model_from_golden(golden), batches_from_golden(golden)

    def by(method: str) -> Callable[[], object]:
        return lambda: prune(model, batches, method=method, sparsity=0.75)

    with tempfile.TemporaryDirectory() as folder:
        source = tiny_models.save_xvlm(Path(folder) / "xvlm")
        photos = tiny_models.save_photos(Path(folder) / "photos")
        words = ["prune", "--model", source, "--data", photos, "--sparsity", "0.75"]
        line = [str(word) for word in (*words, "--out", Path(folder) / "out")]
        runs = {
            "prune(multiflow)": by("multiflow"),
            "prune(chita)": by("chita"),
            "vlp prune": lambda: CliRunner().invoke(vlp, line, catch_exceptions=False),
        }
        for title, run in runs.items():
            names = entered(run)
            print(f"{title}: {len(names)} files")
            if "--names" in sys.argv:
                print("".join(f"  {name}\n" for name in names), end="")


if __name__ == "__main__":
    main()
