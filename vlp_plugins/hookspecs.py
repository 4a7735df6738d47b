"""Every extension point. A plug-in is a module or object with some of these functions.

A distribution announces it in the entry-point group `vlp_plugins`:

    [project.entry-points.vlp_plugins]
    my_plugin = "my_package.plugin"

and marks its functions with `vlp_plugins.hookimpl`. Our own methods and adapters are registered
through these same hooks, so nothing here is out of reach for an outsider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from vlp_plugins.calibration.selections import TokenSelection
    from vlp_plugins.methods.method import Method
    from vlp_plugins.methods.reconstruction.layer import Solver
    from vlp_plugins.models.adapter import Adapter
    from vlp_plugins.scoring.allocation import Allocation
    from vlp_plugins.scoring.score import Scorer

PROJECT = "vlp_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def vlp_scorers() -> Mapping[str, Callable[..., Scorer]]:  # type: ignore[empty-body]
    """Scores by name.

    Returns:
        name -> class or factory. Called with the scorer's parameters as keywords. A scorer is at
        once usable as a method of the same name (its score with global allocation) unless a
        method has that name.
    """


@hookspec
def vlp_allocations() -> Mapping[str, Callable[..., Allocation]]:  # type: ignore[empty-body]
    """Allocations by name.

    Returns:
        name -> class or factory. Called with the allocation's parameters as keywords, or without:
        `allocation="NAME"`, `allocation="NAME(parameter=value)"`.
    """


@hookspec
def vlp_token_selections() -> Mapping[  # type: ignore[empty-body]
    str, Callable[..., TokenSelection]
]:
    """Token selections by name.

    Returns:
        name -> class or factory. Called with the selection's parameters as keywords, or without:
        `tokens="NAME"`, `tokens="NAME(parameter=value)"`.
    """


@hookspec
def vlp_solvers() -> Mapping[str, Callable[..., Solver]]:  # type: ignore[empty-body]
    """Layer-wise solvers by name.

    Returns:
        name -> class or factory. Called with the solver's parameters as keywords. A solver is at
        once usable as a method of the same name, with its own score and allocation, unless a method
        or a score has that name.
    """


@hookspec
def vlp_methods() -> Mapping[str, Callable[..., Method]]:  # type: ignore[empty-body]
    """Pruning methods by name.

    A `Composition` is `id*NAME` too, with intrinsic dimensions for factors of its importance; a
    `Procedure` is if it implements `with_factors`. `vlp methods` shows the docstring of what is
    returned: its first line, with authors, venue and year of a paper in parentheses, and `Args`.

    Returns:
        name -> class or factory. Called with the method's parameters as keywords.
    """


@hookspec
def vlp_adapters() -> Mapping[str, Callable[[], Adapter]]:  # type: ignore[empty-body]
    """Model adapters by name.

    Returns:
        name -> class or factory without arguments. All adapters are asked in turn whether they
        claim a model; importing the plug-in should not import a modelling library.
    """


@hookspec
def vlp_hosts() -> Mapping[str, Callable[[], Any]]:  # type: ignore[empty-body]
    """Pruning frameworks that the methods appear in, by name.

    Returns:
        name -> function that imports the host and returns its integration. It is called by
        `vlp plugins`, which says whether the host can be used, and by `Registry.host`; it may raise
        ImportError with the extra to install.
    """
