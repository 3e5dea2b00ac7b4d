"""Callbacks of the transformers `Trainer`: resampling, robust adaptation. Needs `trainer`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from rosa_func import distributed, samplers
from rosa_func._scores import check_how
from rosa_func._slots import Slots, check_moments, check_slots, fresh, unwrapped
from rosa_func.extras import needs
from rosa_func.keys import check_key, fold_in, generator
from rosa_func.module import RosaModule
from rosa_func.samplers import Sampler, check_sampler
from rosa_func.weight import read
from rosa_func.weight.layout import leaves
from rosa_func.weight.sparse_part import sparse_parts

with needs("trainer"):
    # Which the Trainer asks for, later and less clearly.
    send_to_device = import_module("accelerate.utils").send_to_device
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
        _checked(kwargs["model"], args)

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


class RobustCallback(TrainerCallback):
    """Train a sparse part beside the factors, on a support chosen after some steps without it.

    Make the `RosaModule` of a state with a sparse part of the size that is wanted, on any support:

        state = sparse.add(state, sparse.support_random(state, density, key=0))

    For `after` steps the gradients of its values are zero. Then `sparse.begin` chooses as many
    places of each weight as it has now, and the values train from zero. No tensor changes its
    shape, so optimizers and DistributedDataParallel go on. A checkpoint has the support, and its
    step says whether it was chosen, so a run that is resumed has the bits of the uninterrupted one.

    The key draws the rows of the training set that are scored, and their dropout. Of several
    processes the first scores, without autocast, and sends the places alone (see
    `distributed.begin`), so all have the same support.

    Pass `weight_decay=0` to the Trainer, whose default it is. For two rates give it an optimizer of
    `optim.groups(module.state, values={"lr": 2e-4})`. With a `ResampleCallback` S is merged at each
    resample, and goes on from zero on its support.

    Args:
        after: optimizer steps without the sparse part; 0 to begin with it.
        batches: how many to score, each of as many rows as one process has in a step; or the
            batches themselves, a list.
        start: the state to train from when the sparse part begins, such as the one that the module
            was made of; the optimizer starts again then, and the schedule goes on. None to go on
            with what was trained.
        how: as in `sparse.scores`.
        loss: (model, batch) -> a scalar; None for the loss that the model returns. Where the
            Trainer has another (smoothed labels, `compute_loss_func`, a subclass), pass
            `trainer.compute_loss`, by `trainer.add_callback(RobustCallback(loss=...))`.
        key: any int.

    Raises:
        ValueError: if `after` is negative, `batches` not positive, or for another word for `how`;
            when training starts with a module without a sparse part, `neftune_noise_alpha`, or a
            training set that has too few rows or none by number; when the sparse part begins, as
            `sparse.begin`, for a `start` that does not fit the module, or as `optim.rebind` for an
            optimizer that cannot start again.
        TypeError: if an argument is of another type; when training starts with a model that is not
            a `RosaModule`.

    Source: Nikdan et al. 2024, "RoSA", section 4.2.

    Example:
        >>> from rosa_func.trainer import RobustCallback
        >>> callback = RobustCallback(after=64, batches=4)  # of Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        after: int = 64,
        *,
        batches: int | list[Any] = 4,
        start: TensorDict | None = None,
        how: str = "mean_square",
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        key: int = 0,
    ) -> None:
        """Remember the options."""
        numbers = {"after": (after, 0)}
        if not isinstance(batches, list):
            numbers["batches"] = (batches, 1)
        for name, (value, least) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int):
                kind = type(value).__name__
                raise TypeError(f"{name} is an int, got {value!r} of type {kind}")
            if value < least:
                raise ValueError(f"{name} is at least {least}, got {value!r}")
        check_how(how)
        check_key(key)
        self.after, self.batches, self.start = after, batches, start
        self.how, self.loss, self.key = how, loss or _loss_of_model, key
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be trained so, and keep the values where they are."""
        values = _values(_checked(kwargs["model"], args))
        if not values:
            raise ValueError(
                "RobustCallback needs a RosaModule whose state has a sparse part, on any support: "
                "sparse.add(state, sparse.support_random(state, density, key=0))"
            )
        if state.global_step <= self.after:
            self._check_rows(args, kwargs["train_dataloader"])
        self._release()
        if state.global_step < self.after:
            # Before they are summed over processes, and before they are clipped.
            for leaf in values.values():
                hook: Any = leaf.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin when the steps are full."""
        if state.global_step == self.after:
            self._release()
            self._begin(args, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the module go."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(
        self, args: Any, *, model: Any, optimizer: Any, train_dataloader: Any, **_: Any
    ) -> None:
        module = _module_of(model)
        module.train()  # as in a step, but after an evaluation it is not
        old, device = module.state, next(module.parameters()).device
        slots = _fresh(optimizer, _values(module) if self.start is None else leaves(old))
        with _seeded(fold_in(self.key, "scores"), device):
            new = distributed.begin(
                module.skeleton,
                old,
                (send_to_device(batch, device) for batch in self._chosen(args, train_dataloader)),
                self.loss,
                start=self.start,
                how=self.how,
            )
        module.state = new
        for leaf, own in slots.items():
            optimizer.state.pop(leaf, None)
            if own:
                optimizer.state[leaf] = own

    def _chosen(self, args: Any, train_dataloader: Any) -> Iterator[Any]:
        """Yield the batches to score."""
        if isinstance(self.batches, list):
            yield from self.batches
            return
        rows, size = train_dataloader.dataset, args.train_batch_size
        order = torch.randperm(len(rows), generator=generator(self.key, "scores", "rows")).tolist()
        for first in range(0, self.batches * size, size):
            yield train_dataloader.collate_fn([rows[i] for i in order[first : first + size]])

    def _check_rows(self, args: Any, train_dataloader: Any) -> None:
        if isinstance(self.batches, list):
            return
        rows, needed = train_dataloader.dataset, self.batches * args.train_batch_size
        if isinstance(rows, IterableDataset) or len(rows) < needed:
            has = "not by number" if isinstance(rows, IterableDataset) else len(rows)
            raise ValueError(
                f"batches={self.batches} of {args.train_batch_size} rows are {needed} rows to "
                f"score, and the training set has {has}: pass a list of batches"
            )


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss


def _values(module: RosaModule) -> dict[str, Tensor]:
    """Return the values of the sparse parts."""
    parts = sparse_parts(read(module.state).adapted())
    return {f"{name}.values": part.values for name, part in parts.items()}


def _fresh(optimizer: Any, named: dict[str, Tensor]) -> dict[Tensor, Slots]:
    """Return what an optimizer is to know of leaves that start again."""
    inside = unwrapped(optimizer)
    for name, leaf in named.items():
        check_slots(inside, name, leaf, dict(inside.state.get(leaf, {})), "reset")
    return {leaf: fresh(inside, leaf, leaf) for leaf in named.values()}


@contextmanager
def _seeded(key: int, device: torch.device) -> Iterator[None]:
    """Let what is drawn from the global generators depend on a key, and leave them as they were."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(key)
        yield


def _checked(model: Any, args: Any) -> RosaModule:
    module = _module_of(model)
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} hooks a copy of the embeddings of "
            "a RosaModule, and adds no noise: leave it out"
        )
    return module


def _module_of(model: Any) -> RosaModule:
    module = getattr(model, "module", model)  # Trainer may hand over the wrapper of DDP
    if not isinstance(module, RosaModule):
        raise TypeError(f"Trainer's model is to be a RosaModule, got {type(module).__name__}")
    return module
