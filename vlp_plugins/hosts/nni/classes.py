"""A class of pruner for every registered method, made when it is asked for."""

from __future__ import annotations

import re

from vlp_plugins.hosts.nni.pruner import VlpPruner
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import UnknownNameError, suggest
from vlp_plugins.scoring.factors import GUIDED

_MODULE = "vlp_plugins.hosts.nni"
_made: dict[str, type[VlpPruner]] = {}


def pruner_class(method: str) -> type[VlpPruner]:
    """The pruner of a method, the same class at every call.

    Args:
        method: a registered name, of ours or an outsider's; `id*NAME` too.

    Raises:
        UnknownNameError: if nobody registered it.
    """
    if method not in _made:
        plain = method.removeprefix(GUIDED)
        names = registry().method_names()
        if plain not in names and ":" not in plain:
            raise UnknownNameError(f"no method is called {plain!r}{suggest(plain, names)}")
        _made[method] = type(
            class_name(method),
            (VlpPruner,),
            {
                "method": method,
                "__module__": _MODULE,
                "__doc__": f"Method `{method}` of vlp_plugins as a pruner; see `VlpPruner`.",
            },
        )
    return _made[method]


def class_names() -> dict[str, str]:
    """Class name -> method, for all registered methods, alone and guided (`id*NAME`)."""
    methods = registry().method_names()
    return {class_name(name): name for name in [*methods, *(GUIDED + m for m in methods)]}


def class_name(method: str) -> str:
    """`chita++` is `ChitaPlusPlusPruner`, `id*multiflow` is `IdMultiflowPruner`."""
    words = re.findall(r"[A-Za-z0-9]+|\+", method)
    return "".join("Plus" if w == "+" else w[:1].upper() + w[1:] for w in words) + "Pruner"
