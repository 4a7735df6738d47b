"""What plug-ins offer, by kind and name, each made with checked parameters."""

from __future__ import annotations

import inspect
import json
import keyword
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args

import pluggy
from torch import nn

from vlp_plugins import hookspecs
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.request import flag, kinds_of
from vlp_plugins.runtime.errors import (
    UnclaimedModelError,
    UnknownNameError,
    UnsupportedError,
    suggest,
)
from vlp_plugins.runtime.model_state import fingerprint, takes_model

Factory = Callable[..., Any]
Kind = Literal[
    "scorers", "methods", "solvers", "allocations", "token_selections", "adapters", "hosts"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
METHOD_KINDS: tuple[Kind, ...] = ("methods", "scorers", "solvers")
"""What can be used as a method, by precedence where one distribution gives them one name."""
SINGULAR: Mapping[Kind, str] = {
    "scorers": "scorer",
    "methods": "method",
    "solvers": "solver",
    "allocations": "allocation",
    "token_selections": "token selection",
    "adapters": "adapter",
    "hosts": "host",
}

_HOOKS: Mapping[str, Kind] = {f"vlp_{kind}": kind for kind in KINDS}
_NAME = re.compile(r"[^\s:,*]+")
"""A colon separates distribution and name, a comma the items of lists on the command line, and a
star what guides a method and its name (`id*multiflow`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """One name that one plug-in registers.

    Attributes:
        plugin: name of the plug-in.
        distribution: normalised name of the distribution that the plug-in is part of.
    """

    kind: Kind
    name: str
    factory: Factory
    plugin: str
    distribution: str
    builtin: bool

    @property
    def qualified(self) -> str:
        """`distribution:name`, which no other distribution can take."""
        return f"{self.distribution}:{self.name}"


def collect(plugin: object) -> dict[Kind, dict[str, Factory]]:
    """Checks all hooks of a plug-in, then calls them.

    Every plug-in gets a plug-in manager of its own, so that one which fails half-way leaves
    nothing behind and a raising hook cannot end the call of another plug-in's.

    Args:
        plugin: module or object with functions marked by `vlp_plugins.hookimpl`.

    Returns:
        By kind, factories by name.

    Raises:
        pluggy.PluginValidationError: if a hook has a wrong name or wrong arguments, lacks its
            mark, raises, or returns anything but a mapping of names to callables.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    callers = manager.get_hookcallers(plugin) or []
    _check_hooks(plugin, callers)
    offered: dict[Kind, dict[str, Factory]] = {kind: {} for kind in KINDS}
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if caller.name in _HOOKS:
                kind = _HOOKS[caller.name]
                offered[kind].update(_call(plugin, caller.name, implementation, offered[kind]))
    return offered


def _check_hooks(plugin: object, callers: list[pluggy.HookCaller]) -> None:
    invalid = partial(pluggy.PluginValidationError, plugin)
    implementations = [(caller, impl) for caller in callers for impl in caller.get_hookimpls()]
    for caller, implementation in implementations:
        # What PluginManager.check_pending() finds, with the nearest name.
        if not caller.has_spec() and not implementation.optionalhook:
            raise invalid(f"unknown hook {caller.name!r}{suggest(caller.name, list(_HOOKS))}")
        if implementation.hookwrapper or implementation.wrapper:
            raise invalid(
                f"hook {caller.name!r} is a wrapper; plug-ins cannot wrap each other here"
            )
    marked = {caller.name for caller in callers}
    unmarked = [
        hook
        for hook in _HOOKS
        if hook not in marked and inspect.isroutine(inspect.getattr_static(plugin, hook, None))
    ]
    if unmarked:
        raise invalid(f"{unmarked[0]} is not marked with @vlp_plugins.hookimpl")
    if not implementations:
        raise invalid(
            f"it implements no hook; write one of {', '.join(_HOOKS)} and mark it with "
            "@vlp_plugins.hookimpl",
        )


def _call(
    plugin: object, hook: str, implementation: pluggy.HookImpl, before: Mapping[str, Factory]
) -> dict[str, Factory]:
    invalid = partial(pluggy.PluginValidationError, plugin)
    try:
        returned = implementation.function()
        offered = dict(returned) if isinstance(returned, Mapping) else None
    except Exception as error:
        raise invalid(f"hook {hook} raised {type(error).__name__}: {error}") from error
    if offered is None:
        raise invalid(
            f"hook {hook} returned {type(returned).__name__}, not a mapping of names to callables",
        )
    for name, factory in offered.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise invalid(
                f"hook {hook} returned the name {name!r}; names are strings without spaces, "
                "colons, commas and stars",
            )
        if name in before:
            raise invalid(f"hook {hook} returned {name!r} twice")
        if not callable(factory):
            raise invalid(f"hook {hook} returned {factory!r} for {name!r}, which is not callable")
    return offered


Made = TypeVar("Made")

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANY_PARAMETER = inspect.signature(lambda **_: None).parameters  # of compiled callables


def make(offer: Offer, parameters: Mapping[str, Any], expected: type[Made]) -> Made:
    """Calls the factory of an offer.

    Args:
        offer: what to make.
        parameters: keywords for its factory; `lambda`, which Python keeps for itself, is the
            factory's `lambda_`, and so for every other such word. Where the factory annotates a
            whole number, 3.0 is 3.
        expected: the class that the result must have.

    Raises:
        UnknownNameError: if it has no parameter of such a name; the message lists those it has.
        UnsupportedError: if a parameter is missing, is not a whole number where one is wanted, is
            refused by the factory with a TypeError, or if the result is of another class.
    """
    what = f"{SINGULAR[offer.kind]} {offer.name!r}"
    known = parameters_of(offer.factory)
    required = {n: p.default is p.empty for n, p in known.items() if p.kind in _NAMED}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    parameters = _for_python(parameters, required, what)
    unknown = [public_name(n) for n in parameters if n not in required and not open_ended]
    if unknown:
        raise UnknownNameError(
            f"{what} has no parameter {unknown[0]!r}; it takes {_list(required)}"
        )
    missing = [public_name(n) for n, needed in required.items() if needed and n not in parameters]
    if missing:
        raise UnsupportedError(
            f"{what} needs a value for {', '.join(missing)}; it takes {_list(required)}"
        )
    for name, value in parameters.items():
        if name in known:
            parameters[name] = _checked(f"{what}: {public_name(name)}", value, known[name])
    try:
        made = offer.factory(**parameters)
    except TypeError as error:
        raise UnsupportedError(
            f"{what} cannot be made with {dict(parameters)!r}: {error}; it takes {_list(required)}"
        ) from error
    if not isinstance(made, expected):
        raise UnsupportedError(
            f"{what} of {offer.distribution} is a {type(made).__name__}, not a "
            f"{expected.__module__}.{expected.__qualname__}; report it to {offer.distribution}"
        )
    return made


def parameters_of(factory: Factory) -> Mapping[str, inspect.Parameter]:
    """The parameters of a factory; annotations that do not resolve stay text.

    A class names in `internal` what its own code alone sets.
    """
    internal = getattr(factory, "internal", ())
    for resolve in (True, False):
        try:
            found = inspect.signature(factory, eval_str=resolve).parameters
            return {name: each for name, each in found.items() if name not in internal}
        except Exception:  # evaluating an outsider's annotation may raise anything
            continue
    return _ANY_PARAMETER


def _for_python(
    parameters: Mapping[str, Any], allowed: Collection[str], what: str
) -> dict[str, Any]:
    """The parameters under the names that the factory has for them."""
    renamed: dict[str, Any] = {}
    for name, value in parameters.items():
        ours = f"{name}_" if keyword.iskeyword(name) and f"{name}_" in allowed else name
        if ours in renamed:
            raise UnsupportedError(f"{what} is given {public_name(ours)!r} twice; give it once")
        renamed[ours] = value
    return renamed


def _checked(what: str, value: Any, parameter: inspect.Parameter) -> Any:
    """The value, an int for 3.0 where one is wanted: YAML, JSON and tuners write it so."""
    kinds = kinds_of(parameter.annotation)
    if kinds == {"bool"} and value is not None:
        return flag(what, value)
    if isinstance(value, bool) or "int" not in kinds or "float" in kinds:
        return value
    if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, float) or (isinstance(value, str) and kinds == {"int"}):
        raise UnsupportedError(f"{what}={value!r}; give a whole number")
    return value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def public_name(name: str) -> str:
    """The name that users write: without the underscore that only Python needs."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def _list(allowed: Mapping[str, bool]) -> str:
    return ", ".join(map(public_name, allowed)) if allowed else "no parameters"


@dataclass(frozen=True)
class PluginReport:
    """One plug-in.

    Attributes:
        name: entry-point name, `distribution:name` if an earlier distribution has it already.
        distribution: normalised name of the distribution.
        registered: by kind the names that can be used; empty if it failed or is blocked.
        error: why nothing of it is registered, on one line; None if it is.
        blocked: left out by the user, and not imported.
    """

    name: str
    distribution: str
    version: str
    registered: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None
    notes: tuple[str, ...] = ()
    blocked: bool = False

    @property
    def status(self) -> str:
        """`ok`, `failed` or `blocked`."""
        return "blocked" if self.blocked else "failed" if self.error else "ok"


def plugins_table(reports: Iterable[PluginReport]) -> list[dict[str, str]]:
    """One row per plug-in, by the names of the columns.

    They are `plug-in`, `distribution`, `version`, `status`, `registered` (as `scorers: a, b;
    adapters: c`) and `notes`: why it failed, or which names clash.
    """
    return [
        {
            "plug-in": report.name,
            "distribution": report.distribution,
            "version": report.version,
            "status": report.status,
            "registered": "; ".join(
                f"{kind.replace('_', ' ')}: {', '.join(names)}"
                for kind, names in report.registered.items()
                if names
            ),
            "notes": report.error or "; ".join(report.notes),
        }
        for report in reports
    ]


_log = logging.getLogger(__name__)

_WITHOUT_PEFT = "give the model without PEFT's layers, model.merge_and_unload(), or "


NAMED_AFTER, TIME_LIMIT = 5.0, 30.0  # seconds
LIMIT_VARIABLE = "VLP_PLUGINS_TIMEOUT"


class _TooLong(BaseException):
    """Raised where a plug-in is, which may handle every `Exception`."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Names a plug-in that takes long, and ends it in the main thread, where Python allows that.

    The limit is 30 seconds, or those of the environment variable `VLP_PLUGINS_TIMEOUT`. After 5 a
    warning says who takes the time.

    Args:
        what: runs.

    Raises:
        UnsupportedError: if it takes longer.
    """
    try:
        limit = float(os.environ.get(LIMIT_VARIABLE) or TIME_LIMIT)
    except ValueError:
        limit = TIME_LIMIT
    hint = f"{LIMIT_VARIABLE}=SECONDS gives it more time, VLP_PLUGINS_BLOCK=NAME leaves it out"
    watch = threading.Timer(
        NAMED_AFTER, _log.warning, ("%s has not ended after %g s; %s", what, NAMED_AFTER, hint)
    )
    watch.daemon = True
    watch.start()
    # Another use of the timer, such as a second Ctrl-C on its way, is left alone.
    interrupts = (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "setitimer")
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    )

    def stop(_number: int, _frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop) if interrupts else None
    try:
        if interrupts:
            signal.setitimer(signal.ITIMER_REAL, limit, 1.0)  # again, if it handles everything
        yield
    except _TooLong:
        raise UnsupportedError(f"{what} has not ended after {limit:g} s; {hint}") from None
    finally:
        watch.cancel()
        if interrupts and signal.getsignal(signal.SIGALRM) is stop:  # Ctrl-C takes it over
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Registry:
    """What all plug-ins together offer.

    Every name may also be written in full, `distribution:name`; that stays right when another
    plug-in that offers the same name is installed later.
    """

    def __init__(
        self, offers: Sequence[tuple[str, Offer]], reports: Sequence[PluginReport] = ()
    ) -> None:
        """Takes offers under their public names, and one report per plug-in."""
        self._offers: Mapping[Kind, dict[str, Offer]] = {kind: {} for kind in KINDS}
        for public, offer in offers:
            self._offers[offer.kind][public] = offer
        self._reports = list(reports)

    def adapter(self, name: str, settings: Mapping[str, Any] | None = None) -> Adapter:
        """A new adapter with what `Adapter.settings` of an earlier one returned, or its defaults.

        Raises:
            UnknownNameError: if there is no such adapter, or it has no such setting.
            UnsupportedError: if the plug-in offers something that is not an adapter.
        """
        offer = self.find(name, "adapters")
        return make(offer, settings or {}, Adapter)  # type: ignore[type-abstract]

    @takes_model
    def adapter_for(self, model: nn.Module) -> Adapter:
        """The adapter that claims a model.

        Outsiders are asked first, so that they can replace a built-in adapter, and those that are
        `general` last. One that raises while it is asked is reported in the log and skipped.

        Raises:
            UnclaimedModelError: if no adapter claims the model.
            UnsupportedError: if several outsiders (or several built-ins) claim it.
        """
        failures: dict[str, str] = {}
        claims = list(self._claims(model, failures))
        for general, builtin in product((False, True), repeat=2):
            claimed = {
                name: adapter
                for name, adapter, ours in claims
                if (adapter.general, ours) == (general, builtin)
            }
            if len(claimed) == 1:
                return next(iter(claimed.values()))
            if claimed:
                raise UnsupportedError(
                    f"adapters {' and '.join(map(repr, claimed))} all claim "
                    f"{type(model).__name__}; choose one with "
                    f"adapter={next(iter(claimed))!r} (--adapter {next(iter(claimed))})"
                )
        failed = "".join(f"; adapter {name!r} failed: {why}" for name, why in failures.items())
        raise UnclaimedModelError(
            f"no adapter claims {type(model).__name__} (asked: "
            f"{', '.join(self.adapter_names()) or 'none is registered'}){failed}; "
            f"{_WITHOUT_PEFT if hasattr(model, 'merge_and_unload') else ''}describe the "
            "model with adapter=ModuleAdapter(model, loss=..., modalities={regex: name})"
        )

    def host(self, name: str) -> Any:
        """The integration of a pruning framework, which is imported now.

        Raises:
            UnknownNameError: if there is no such host.
            UnsupportedError: if the framework is not installed.
        """
        try:
            return make(self.find(name, "hosts"), {}, object)
        except ImportError as error:
            raise UnsupportedError(f"host {name!r} cannot be used: {error}") from error

    def host_failures(self) -> dict[str, str | None]:
        """By name of a host why it cannot be used, or None; every framework is imported."""
        found: dict[str, str | None] = {}
        for name in self.names("hosts"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.host(name)
                found[name] = None
            except (Exception, SystemExit) as error:
                found[name] = str(error.__cause__ or error) or type(error).__name__
        return found

    def find(self, name: str, *kinds: Kind) -> Offer:
        """The offer of that name, of the first kind that has it.

        Raises:
            UnknownNameError: if there is none.
        """
        for kind in kinds:
            if name in self._offers[kind]:
                return self._offers[kind][name]
        offers = [item for kind in kinds for item in self._offers[kind].items()]
        in_full = [offer for _, offer in offers if offer.qualified == name]
        if len({offer.kind for offer in in_full}) == len(in_full) > 0:
            return in_full[0]
        what = SINGULAR[kinds[0]]
        alike = [public for public, offer in offers if name in (offer.name, offer.qualified)]
        if alike:
            raise UnknownNameError(
                f"{what} {name!r} must be named in full: {' or '.join(map(repr, alike))}"
            )
        known = list(dict(offers))  # a score, a solver and a method may share a name
        skipped = [report.name for report in self._reports if report.status != "ok"]
        raise UnknownNameError(
            f"no {what} is called {name!r:.80}"
            + (suggest(name, known) if known else f" (no {what} is registered)")
            + (f"; skipped plug-ins: {', '.join(skipped)} (see `vlp plugins`)" if skipped else "")
        )

    def make(self, kind: Kind, text: str, expected: type[Made]) -> Made:
        """What is named, with the parameters that may follow the name in parentheses.

        Args:
            kind: of what is offered.
            text: `owl`, or `owl(M=3)`; values are read as JSON, anything else is text.
            expected: the class that the result must have.

        Raises:
            UnknownNameError: if there is none of that name, or it has no such parameter.
            UnsupportedError: if it cannot be made with these parameters.
        """
        name, _, rest = text.partition("(")
        if not rest:
            return make(self.find(text, kind), {}, expected)
        offer = self.find(name.strip(), kind)
        pairs = [pair.partition("=") for pair in rest.removesuffix(")").split(",") if pair.strip()]
        if not rest.endswith(")") or not all(equals for _, equals, _ in pairs):
            raise UnsupportedError(
                f"{SINGULAR[kind]} {text!r:.80}: parameters are written {name.strip()}(name=value)"
            )
        return make(
            offer, {key.strip(): _value(value.strip()) for key, _, value in pairs}, expected
        )

    def names(self, kind: Kind) -> list[str]:
        """Names of all of one kind, sorted."""
        return sorted(self._offers[kind])

    def method_names(self) -> list[str]:
        """Names that `method` takes, those of scorers and solvers among them, sorted."""
        return sorted({name for kind in METHOD_KINDS for name in self._offers[kind]})

    def adapter_names(self) -> list[str]:
        """Names of all adapters, sorted."""
        return sorted(self._offers["adapters"])

    def plugins(self) -> list[PluginReport]:
        """One report per plug-in; `plugins_table` makes a table of them."""
        return list(self._reports)

    def _claims(
        self, model: nn.Module, failures: dict[str, str]
    ) -> Iterator[tuple[str, Adapter, bool]]:
        """Every adapter that claims the model: its name, itself, and whether it is ours."""
        for name, offer in self._offers["adapters"].items():
            before = None if offer.builtin else fingerprint((*model.parameters(), *model.buffers()))
            what = f"adapter {name!r} of {offer.distribution}, asked for a model,"
            adapter = None
            try:
                with nullcontext() if offer.builtin else time_limit(what):
                    found = self.adapter(name)
                    adapter = found if found.claims(model) else None
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # it may raise anything
                failures[name] = f"{type(error).__name__}: {error}"
                _log.warning(
                    "adapter %r of %s was skipped for %s: %s",
                    name,
                    offer.distribution,
                    type(model).__name__,
                    failures[name],
                )
            if before is not None and before != fingerprint(
                (*model.parameters(), *model.buffers())
            ):
                raise UnsupportedError(
                    f"adapter {name!r} of {offer.distribution} changed the weights of "
                    f"{type(model).__name__} while it was asked for it; load the model again, and "
                    f"leave the plug-in out: VLP_PLUGINS_BLOCK={offer.plugin}"
                )
            if adapter is not None:
                yield name, adapter, offer.builtin
