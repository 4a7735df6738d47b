"""The tokens that a selection chooses in a block, as a walk asks for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlp_plugins.calibration.selections import BlockCall, TokenSelection, check_selected


def chosen_tokens(
    selection: TokenSelection, calls: list[BlockCall], weight: str = "w", **options: Any
) -> list[Tensor]:
    state = selection.begin(**options)
    if selection.reads_all_first:
        for each in calls:
            state.observe(each)
        state.agree()
    found = []
    for each in calls:
        if not selection.reads_all_first:
            state.observe(each)
        found.append(state.selected(each.sample, weight))
        check_selected(found[-1], each.kinds.shape, selection.name, weight)
        assert state.selected(each.sample, weight) is found[-1]
    return found
