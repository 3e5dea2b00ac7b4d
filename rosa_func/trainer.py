"""Resampling as a callback of the transformers `Trainer`. Needs the extra `trainer`."""

from importlib import import_module
from typing import Any

from rosa_func import samplers
from rosa_func._slots import check_moments
from rosa_func.extras import needs
from rosa_func.keys import check_key, fold_in
from rosa_func.module import RosaModule
from rosa_func.samplers import Sampler, check_sampler

with needs("trainer"):
    import_module("accelerate")  # what the Trainer asks for, later and less clearly
    from transformers import TrainerCallback
    from transformers.utils import logging

_logger = logging.get_logger(__name__)


class ResampleCallback(TrainerCallback):
    """Resample a `RosaModule` between optimizer steps, and rebind the Trainer's optimizer.

    The key of a draw is `fold_in(key, step)`, so a run that is resumed draws as the uninterrupted
    one. Pass `weight_decay=0` to the Trainer, whose default it is: decay on A and B decays
    *pretrained* content.

    Args:
        every: optimizer steps between two resamples; None for one at each epoch's start, as in
            the paper. What is best is a choice of the task: see `resample`.
        key: any int.
        sampler: as in `resample`.
        moments: as in `optim.rebind`.
        fraction: as in `optim.rebind`.

    Raises:
        ValueError: if `every` is not positive, or as `optim.rebind` for moments and fraction; when
            training starts with `neftune_noise_alpha`.
        TypeError: if an argument is of another type; when training starts with a model that is not
            a `RosaModule`.

    Example:
        >>> from rosa_func.trainer import ResampleCallback
        >>> callback = ResampleCallback(every=500)  # of Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        every: int | None = None,
        *,
        key: int = 0,
        sampler: Sampler = samplers.random,
        moments: str = "reset",
        fraction: float | None = None,
    ) -> None:
        """Remember the options."""
        if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
            raise TypeError(
                f"every is None or an int, got {every!r} of type {type(every).__name__}"
            )
        if every is not None and every < 1:
            raise ValueError(f"every is None or a positive number of steps, got {every!r}")
        check_key(key)
        check_sampler(sampler)
        check_moments(moments, fraction)
        self.every, self.key, self.sampler = every, key, sampler
        self.moments, self.fraction = moments, fraction

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a model that cannot be resampled, and noise that would not reach it."""
        _module_of(kwargs["model"])
        if args.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} hooks a copy of the embeddings of "
                "a RosaModule, and adds no noise: leave it out"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what Trainer saves."""
        if state.is_world_process_zero:
            _logger.warning_once(
                "Trainer saves the state of a RosaModule, from which a run resumes; "
                "model.save_pretrained(folder) writes the merged model, for from_pretrained"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resample when the steps are full."""
        step = state.global_step
        if self.every is not None and step and step % self.every == 0:
            self._resample(step, **kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resample at each epoch but the first, and not where a run is resumed inside one."""
        if self.every is None and state.global_step and state.epoch == int(state.epoch):
            self._resample(state.global_step, **kwargs)

    def _resample(self, step: int, *, model: Any, optimizer: Any, **_: Any) -> None:
        _module_of(model).resample(
            fold_in(self.key, step),
            sampler=self.sampler,
            optimizer=optimizer,
            moments=self.moments,
            fraction=self.fraction,
        )


def _module_of(model: Any) -> RosaModule:
    module = getattr(model, "module", model)  # Trainer may hand over the wrapper of DDP
    if not isinstance(module, RosaModule):
        raise TypeError(f"Trainer's model is to be a RosaModule, got {type(module).__name__}")
    return module
