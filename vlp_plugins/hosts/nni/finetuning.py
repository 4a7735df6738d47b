"""A few steps on the pre-training loss with the zeros kept: what a pruned model recovers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.calibration.loss import check_loss, total
from vlp_plugins.hosts.nni.overlay import TrialSettings
from vlp_plugins.jobs.preparation import Prepared
from vlp_plugins.jobs.recipes import Recipe, need
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import DataError, RecipeError, UnsupportedError
from vlp_plugins.runtime.model_state import autocast_of, flags_kept, precision, random_state_kept


def check_finetuning(recipe: Recipe, settings: TrialSettings) -> None:
    """Makes sure that the model can be fine-tuned, before the work.

    Raises:
        RecipeError: if there is no data, or a number is out of range.
        UnsupportedError: for a precision in which small steps are lost.
    """
    if not settings.finetune_steps:
        return
    need(recipe, "data.source")
    if settings.learning_rate <= 0:
        raise RecipeError(f"the learning rate must be above 0, not {settings.learning_rate:g}")
    if recipe.dtype != "float32" or recipe.autocast == "float16":
        raise UnsupportedError(
            "fine-tuning takes weights in float32, in which small steps are not lost, and of "
            "autocast only bfloat16; leave --dtype out and give --autocast bfloat16 if need be"
        )


def finetune(
    job: Prepared,
    masks: Masks,
    batches: Iterable[Batch],
    settings: TrialSettings,
    told: Callable[[int], None],
) -> None:
    """Trains every parameter that wants gradients by AdamW, with torch's other standard values.

    The random state is as before afterwards, and so are the training flags.

    Args:
        job: of the model, in which the masks are applied already.
        masks: whose zeros stay.
        batches: of the calibration data; begun again as often as needed.
        settings: number of steps, learning rate.
        told: called with the number of steps done after every `report_every`, and after the last.

    Raises:
        NonFiniteError: if the loss becomes NaN or infinite.
        MaskError: if a removed weight is not zero at the end.
        DataError: if there are no batches.
    """
    model, adapter = job.model, job.adapter
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    device = parameters[0].device
    dtype = autocast_of(job.recipe.autocast)
    with (
        SparsityLock(model, masks, adapter).attach(optimizer) as lock,
        random_state_kept(device),
    ):
        torch.manual_seed(job.recipe.seed)
        with flags_kept(model):
            model.train()
            for step, batch in zip(
                range(1, settings.finetune_steps + 1), _again_and_again(batches), strict=False
            ):
                with precision(device, dtype):
                    terms = adapter.losses(model, to_device(batch, device))
                check_loss(terms, step - 1)
                total(terms).backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % settings.report_every == 0 or step == settings.finetune_steps:
                    told(step)
        lock.check()


def _again_and_again(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        one = False
        for batch in batches:
            one = True
            yield batch
        if not one:
            raise DataError("there are no batches to fine-tune on")
