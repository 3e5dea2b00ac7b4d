"""What a method does to a model: its first draw, its support, its steps and its resamples."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from examples.experiments import draws
from examples.experiments.plan import Cell, Method
from examples.experiments.task import Metrics, Task
from rosa_func.samplers import Sampler

GRADIENT_BATCHES = 4  # for the draws and the supports that look at the gradient
PRUNED = 0.9  # of the moments, where they are pruned; ReLoRA's choice


class Adaptation:
    """The state of a method and its optimizer. The task's own model is not held."""

    def __init__(self, task: Task, cell: Cell) -> None:
        """Draw the first subspaces, or take every parameter for full fine-tuning."""
        self.cell, self.batches, self.loss = cell, task.batches, task.loss
        self.evaluated, self.solve, self.model = task.evaluate, task.solve, task.model
        method = cell.method
        if method.sampler == "full":
            self.state = everything(task.model, matrices=method.train == "matrices")
        else:
            options = {"targets": None, "train": task.train, "key": cell.seed}
            options["sampler"] = self.sampler(lambda: dict(task.model.named_parameters()), 0)
            options |= {"quantize": method.quantize or None, "master": method.master or None}
            self.state = rosa_func.init(task.model, method.rank, **options)
        self.density = density(task.model, method.budget, method.rank) if method.budget else 0.0
        self.model = rosa_func.skeleton(task.model)  # the weights are in the state from here on
        if method.budget and not method.begin:
            self.state = rosa_func.sparse.add(self.state, self.support(0))
        self.first = self.snapshot() if method.restart else None
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer of the leaves of the moment."""
        return torch.optim.AdamW(self.groups(), weight_decay=0.0)

    @property
    def trainable(self) -> int:
        """Return how many values train at the moment."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the state of the moment."""
        return rosa_func.call(self.model, self.state, *args, **kwargs)

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by side, since a side may have a rate of its own or none."""
        method = self.cell.method
        groups = rosa_func.optim.groups(
            self.state,
            input=None if method.train == "output" else {"times": 1.0},
            output=None if method.train == "input" else {"times": method.ratio},
            full={"times": 1.0},
        )
        return [{"times": method.values, **group} for group in groups]  # the rest are values of S

    def sampler(self, weights: Callable[[], dict[str, Tensor]], step: int) -> Sampler:
        """Return the method's sampler; `weights`, for a gradient, is called where one is needed."""
        method = self.cell.method
        if method.sampler in ("aligned", "importance"):
            sampler = getattr(draws, method.sampler)(self.gradients(weights(), step))
        else:
            own = draws if hasattr(draws, method.sampler) else rosa_func.samplers
            sampler = getattr(own, method.sampler)
        return sampler if method.share == 0.5 else draws.shared(sampler, method.share)

    def gradients(self, weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the sum of the gradients by each matrix over a few batches of the draw's own."""
        self.model.eval()
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items() if w.ndim >= 2}

        def forward(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.model, weights | leaves, args, kwargs)

        for batch in islice(self.batches(draw_seed(self.cell.seed, step)), GRADIENT_BATCHES):
            self.loss(forward, batch).backward(inputs=list(leaves.values()))
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def support(self, step: int) -> dict[str, Tensor]:
        """Return where the sparse values are, by gradients of a few batches of its own."""
        key = rosa_func.fold_in(self.cell.seed, "support", step)
        if self.cell.method.support == "random":
            return rosa_func.sparse.support_random(self.state, self.density, key)
        self.model.eval()
        batches = islice(self.batches(draw_seed(self.cell.seed, step)), GRADIENT_BATCHES)
        scores = rosa_func.sparse.scores(self.model, self.state, batches, self.loss)
        return rosa_func.sparse.support(scores, self.density)

    def begin(self, step: int) -> None:
        """Add the sparse part to what is there, or to the first weights and factors."""
        support, old = self.support(step), self.optimizer
        self.state = rosa_func.sparse.add(self.state if self.first is None else self.first, support)
        self.optimizer = self.new_optimizer()
        if not self.cell.method.restart:
            self.optimizer.state.update(old.state)

    def resample(self, step: int, *, donate: bool = False) -> None:
        """Begin a cycle; the schedule and the order of the data go on.

        A state with a snapshot cannot be donated: the two share the residuals.
        """
        method = self.cell.method
        sampler = self.sampler(lambda: rosa_func.merge(self.state), step)
        key = rosa_func.fold_in(self.cell.seed, step)
        new = rosa_func.resample(self.state, key, sampler=sampler, donate=donate)
        if not method.solve:
            pruned = {"fraction": PRUNED} if method.moments == "prune" else {}
            rosa_func.optim.rebind(
                self.optimizer, self.state, new, moments=method.moments, **pruned
            )
        self.state = new

    def train(self, batch: Any, rate: float) -> float:
        """Take one step of AdamW, or solve the cycle; return the loss before it."""
        if self.cell.method.solve:
            assert self.solve is not None, "this task has no exact solution"
            self.solve(self.state)
            return 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        self.model.train()
        loss = self.loss(self.forward, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self, split: str) -> Metrics:
        """Score the state of the moment, with dropout off."""
        self.model.eval()
        return self.evaluated(self.forward, split)

    def snapshot(self) -> TensorDict:
        """Return the state with copies of what is trained; the residuals are shared."""
        return self.state.replace(trainable=self.state["trainable"].detach().clone())


def draw_seed(seed: int, step: int) -> int:
    """Return the seed of the batches that a draw looks at, so that training's order stays."""
    return rosa_func.fold_in(seed, "draw", step) % 2**31


def cycle_starts(method: Method, steps: int) -> Iterator[int]:
    """Yield the steps before which new subspaces are drawn."""
    at, length = 0.0, float(method.every)
    while method.every and (at := at + length) < steps:
        yield round(at)
        length *= method.growth


def everything(model: nn.Module, matrices: bool = False) -> TensorDict:
    """Return a state that trains every parameter in full, or those matrices that have factors."""
    return rosa_func.init(model, train=list(adapted(model)) if matrices else ["*"])


def adapted(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the weights that have factors: how many values of rank 1, and how many in all."""
    like = rosa_func.init(model, 1, sampler=rosa_func.samplers.lora)
    return {name: of for name, of in rosa_func.count(like).weights.items() if of[0]}


def density(model: nn.Module, budget: int, rank: int) -> float:
    """Return the part of each weight that is as many values as the factors leave of the budget."""
    values, entries = map(sum, zip(*adapted(model).values(), strict=True))
    return (budget - rank) * values / entries
