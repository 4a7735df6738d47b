"""Errors for the person who reads them: what is wrong, with which values, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path


class VlpError(Exception):
    """Base of every error that a user can mend. The command line prints it on one line.

    Example:
        try:
            masks = vlp.prune(model, method="multiflow", sparsity=0.75)
        except vlp.VlpError as error:
            print(error)
    """


class UnknownNameError(VlpError):
    """A method, adapter, key or other name that is not registered."""


class UnclaimedModelError(VlpError):
    """No adapter claims the model."""


class UnsupportedError(VlpError):
    """The model, adapter or method cannot do what was asked."""


class TieError(VlpError):
    """Weights share memory in a way that one mask cannot describe, or lost their tie."""


class BatchError(VlpError):
    """A batch lacks an input or has one of a wrong shape."""


class NonFiniteError(VlpError):
    """NaN or infinity in weights, activations or scores."""


class StructureError(VlpError):
    """Heads or units that cannot be cut, or a cut model that computes something else."""


class SparsityError(VlpError):
    """A sparsity or budget that cannot be met."""


class MaskError(VlpError):
    """A mask file that is damaged, or masks that do not fit the model."""


class StatisticsError(VlpError):
    """Statistics that are missing, damaged or of another model."""


class DataError(VlpError):
    """Calibration or evaluation data that cannot be read."""


class RecipeError(VlpError):
    """A recipe with an unknown key or a value of a wrong type."""


class OutputError(VlpError):
    """An output that exists already or cannot be written."""


_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_FILE = re.compile(
    r"\.(csv|jsonl?|parquet|arrow|tar|tgz|gz|zip|pth?|th|bin|ckpt|safetensors|ya?ml)", re.IGNORECASE
)
_SIBLINGS = 1000  # names of a folder that are looked at for a similar one


def check_hub_id(source: str, what: str, error: type[VlpError]) -> None:
    """Checks that what is not on the disk may be an id of the hub; a path is not looked up there.

    The source, which is to be `data` or a `model`, may end in `:configuration`.

    Raises:
        VlpError: of type `error`, if it is the path of something that does not exist.
    """
    path = Path(source).expanduser()
    if path.exists():
        return
    text = f"{what} {source} does not exist"
    if "://" in source:
        raise error(f"{text}; download it first")
    parent = path.parent if "/" in source else None
    name = re.sub(r":[\w.-]+$", "", source)
    if not _HUB_ID.fullmatch(name) or _FILE.fullmatch(path.suffix):
        raise error(f"{text}: check the path{nearest_path(path)}")
    if parent is not None and parent.is_dir():
        raise error(
            f"{text}: check the path{nearest_path(path)}; it is not looked up on the hub, as there "
            f"is a folder {parent}"
        )


def nearest_path(path: Path) -> str:
    """` (did you mean photos?)` for the nearest name in its folder, or nothing."""
    from difflib import get_close_matches

    names: list[str] = []
    with suppress(OSError):
        names = [each.name for each in islice(path.parent.iterdir(), _SIBLINGS)]
    close = get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Makes an error of an exit in what others wrote: the program would end as if all were well.

    An exit is `sys.exit`, and an error that carries an `exit_code`, as those of click do.

    Args:
        what: whose code runs, for the message.

    Raises:
        UnsupportedError: in place of the exit.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            call, code = "sys.exit", error.code
        elif hasattr(error, "exit_code"):  # no error of ours has one
            call, code = type(error).__name__, error.exit_code
        elif isinstance(error, Exception | KeyboardInterrupt | GeneratorExit):
            raise
        else:  # a class of the plug-in's own, which nothing in a program handles
            raise UnsupportedError(
                f"{what} raises {type(error).__name__}: {error}, which is not an Exception"
            ) from error
        raise UnsupportedError(
            f"{what} calls {call}({code!r}), which would end the program; a plug-in raises "
            "an error instead"
        ) from error


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Says whose code raised an error, in what others wrote; an exit becomes one: see `no_exit`.

    Args:
        what: whose code runs, for the message.

    Raises:
        UnsupportedError: in place of an exit, and of errors that are not ours.
    """
    try:
        with no_exit(what):
            yield
    except VlpError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedError(f"{what} raises {type(error).__name__}: {error}") from error


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full, of RAM or of a device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        part in str(error).lower() for part in _OUT_OF_MEMORY
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none: reasons in a message."""
    lines = str(error).strip().splitlines()
    return _short(lines[0], _LINE) if lines else type(error).__name__


def shown(value: object) -> str:
    """A value of a file in a message: what Python writes for it, or the beginning of that."""
    try:
        return _short(repr(value), _VALUE)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists
        return f"a value of type {type(value).__name__} too long to write"


_LINE, _VALUE = 300, 80
"""Characters of a reason and of a value that one still reads."""


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def suggest(name: str, known: list[str]) -> str:
    """` (did you mean 'multiflow'?)` for the nearest known name, else the list of them."""
    from difflib import get_close_matches

    lowered = {each.lower(): each for each in reversed(known)}
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    close = close or [lowered[n] for n in get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)]
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"


def check_known(what: str, value: object, known: Iterable[str]) -> None:
    """Raises `UnsupportedError`, with the nearest known value, for any other."""
    names = list(known)
    if value not in names:
        raise UnsupportedError(f"{what} {value!r} is unknown{suggest(str(value), names)}")
