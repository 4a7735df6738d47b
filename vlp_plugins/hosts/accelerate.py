"""The lock in a training loop of `accelerate`: zeros are checked whenever it saves, and at the end.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    lock = SparsityLock(model, masks).attach(optimizer)
    with locked(accelerator, lock):
        ...  # the usual loop
        accelerator.save_state("state")

The lock itself needs nothing of `accelerate`; it is made of what `prepare` returns, because that
may have moved or sharded the parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from vlp_plugins.masks.lock import SparsityLock

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)
_SAVING = ("save_state", "save_model")


@contextmanager
def locked(accelerator: Accelerator, lock: SparsityLock) -> Iterator[SparsityLock]:
    """Watches over a lock in a block, and lets go of it at the end.

    Meanwhile `accelerator.save_state` and `save_model` refuse weights that are not as sparse as
    they should be, before anything is written; `load_state` zeroes what a state of a dense run
    brings.

    Args:
        accelerator: that has prepared the model.
        lock: attached to the optimizer.

    Yields:
        The lock.

    Raises:
        MaskError: when saving, and at the end of the block, if something that the masks remove is
            not zero.
    """
    # Its own hooks come too late: of a sharded model they run when the weights are written already.
    replaced: dict[str, Any] = {
        name: partial(lock.save_checked, getattr(accelerator, name)) for name in _SAVING
    }
    replaced["load_state"] = partial(_load_masked, lock, accelerator.load_state)
    before = {name: vars(accelerator)[name] for name in replaced if name in vars(accelerator)}
    try:
        for name, function in replaced.items():
            setattr(accelerator, name, function)
        yield lock
        lock.check()
    finally:
        for name in replaced:
            delattr(accelerator, name)
        vars(accelerator).update(before)  # of another lock, in whose block this one is
        lock.detach()


def _load_masked(lock: SparsityLock, load: Any, *args: Any, **options: Any) -> None:
    load(*args, **options)
    if found := lock.violations():
        _log.warning(
            "the state that was loaded is of a model that is not as sparse as the masks (first: "
            "%r, %d of %d removed elements); they are zeroed now",
            found[0].weight,
            found[0].revived,
            found[0].removed,
        )
        lock.apply()
