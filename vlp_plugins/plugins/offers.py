"""What one plug-in offers: its hooks, checked and called apart from every other plug-in's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pluggy

from vlp_plugins import hookspecs
from vlp_plugins.runtime.errors import suggest

Factory = Callable[..., Any]
Kind = Literal["scorers", "methods", "adapters", "hosts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SINGULAR: Mapping[Kind, str] = {
    "scorers": "scorer",
    "methods": "method",
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
        kind: scorers, methods, adapters or hosts.
        name: the name that the plug-in gives.
        factory: makes the scorer, method, adapter or host.
        plugin: name of the plug-in.
        distribution: normalised name of the distribution that the plug-in is part of.
        builtin: true for our own.
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
    implementations = [(caller, impl) for caller in callers for impl in caller.get_hookimpls()]
    for caller, implementation in implementations:
        # What PluginManager.check_pending() finds, with the nearest name.
        if not caller.has_spec() and not implementation.optionalhook:
            raise pluggy.PluginValidationError(
                plugin, f"unknown hook {caller.name!r}{suggest(caller.name, list(_HOOKS))}"
            )
        if implementation.hookwrapper or implementation.wrapper:
            raise pluggy.PluginValidationError(
                plugin, f"hook {caller.name!r} is a wrapper; plug-ins cannot wrap each other here"
            )
    marked = {caller.name for caller in callers}
    unmarked = [
        hook
        for hook in _HOOKS
        if hook not in marked and inspect.isroutine(inspect.getattr_static(plugin, hook, None))
    ]
    if unmarked:
        raise pluggy.PluginValidationError(
            plugin, f"{unmarked[0]} is not marked with @vlp_plugins.hookimpl"
        )
    if not implementations:
        raise pluggy.PluginValidationError(
            plugin,
            f"it implements no hook; write one of {', '.join(_HOOKS)} and mark it with "
            "@vlp_plugins.hookimpl",
        )


def _call(
    plugin: object, hook: str, implementation: pluggy.HookImpl, before: Mapping[str, Factory]
) -> dict[str, Factory]:
    try:
        returned = implementation.function()
        offered = dict(returned) if isinstance(returned, Mapping) else None
    except Exception as error:
        raise pluggy.PluginValidationError(
            plugin, f"hook {hook} raised {type(error).__name__}: {error}"
        ) from error
    if offered is None:
        raise pluggy.PluginValidationError(
            plugin,
            f"hook {hook} returned {type(returned).__name__}, not a mapping of names to callables",
        )
    for name, factory in offered.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise pluggy.PluginValidationError(
                plugin,
                f"hook {hook} returned the name {name!r}; names are strings without spaces, "
                "colons, commas and stars",
            )
        if name in before:
            raise pluggy.PluginValidationError(plugin, f"hook {hook} returned {name!r} twice")
        if not callable(factory):
            raise pluggy.PluginValidationError(
                plugin, f"hook {hook} returned {factory!r} for {name!r}, which is not callable"
            )
    return offered
