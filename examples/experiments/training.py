"""One cell: the same loop for every method, from the first evaluation to the test."""

import math
import platform
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import transformers
from tensordict import TensorDict
from torch import Tensor

import rosa_func
from rosa_func.samplers import Sampler

from ..finetune_data import rate_at
from ..peak_memory import peak_memory_of_this_process
from . import draws
from .plan import Cell, Method
from .records import Line
from .task import Metrics, Task

GRADIENT_BATCHES = 4  # for the draws that look at the gradient
PRUNED = 0.9  # of the moments, where they are pruned; ReLoRA's choice


def run(
    cell: Cell, load: Callable[[], Task], tick: Callable[[], None] = lambda: None
) -> Iterator[Line]:
    """Yield the lines of a cell; `tick` is called after each step."""
    setting, method = cell.setting, cell.method
    head = {"cell": cell.key}
    yield head | {"event": "start", **_described(cell)}
    before = peak_memory_of_this_process()
    task = load()
    run = Run(task, cell)
    stream, seconds = task.batches(cell.seed), 0.0
    best, kept = math.inf, run.state
    resamples = set(cycle_starts(method, cell.steps))
    for step in range(cell.steps + 1):
        last = step == cell.steps
        if last or step % setting["eval_every"] == 0:
            metrics: dict[str, Any] = dict(run.evaluate("dev"))
            if not math.isfinite(metrics["loss"]):
                yield head | {"event": "diverged", "step": step}
                break
            if setting.get("spectrum") and cell.phase == "final":
                metrics |= spectrum(task, run.state)
            yield head | {"event": "dev", "step": step, "seconds": seconds, **metrics}
            if metrics["loss"] < best:
                best, kept = metrics["loss"], run.snapshot()
            if last:
                break
        start = time.perf_counter()
        if step in resamples:
            run.resample(step)
        finite = run.train(next(stream), rate(cell, step, resamples))
        seconds += time.perf_counter() - start
        tick()
        if not finite:
            yield head | {"event": "diverged", "step": step}
            break
    peak = peak_memory_of_this_process()
    end = head | {"event": "end", "trainable": run.trainable, "seconds": seconds}
    end |= {"peak_mib": peak - before, "cycles": 1 + len(resamples), "steps": cell.steps}
    end |= {"best": None if math.isinf(best) else best}
    if cell.phase == "final" and not math.isinf(best):
        run.state = kept
        end["test"] = run.evaluate("test")  # the one time that it is touched
        if task.generate:
            end["generated"] = task.generate(rosa_func.merge(run.state))
    yield end


def rate(cell: Cell, step: int, resamples: set[int]) -> float:
    """Warm up, then fall linearly to zero, over the whole run, the same for every method."""
    usual = rate_at(step, cell.rate, cell.setting["warmup"], cell.steps)
    since = step - max((s for s in resamples if s <= step), default=0)
    if cell.method.rewarm and step > since:
        usual *= min(1.0, (since + 1) / (cell.method.rewarm + 1))
    return usual


def cycle_starts(method: Method, steps: int) -> Iterator[int]:
    """Yield the steps before which new subspaces are drawn."""
    at, length = 0.0, float(method.every)
    while method.every and (at := at + length) < steps:
        yield round(at)
        length *= method.growth


class Run:
    """The state of a method, its optimizer, and what they do at a step and at a resample."""

    def __init__(self, task: Task, cell: Cell) -> None:
        """Draw the first subspaces, or take every parameter for full fine-tuning."""
        self.task, self.cell, method = task, cell, cell.method
        self.model = task.model
        if method.sampler == "full":
            self.state = everything(task.model)
        else:
            weights = {name: p.detach() for name, p in task.model.named_parameters()}
            sampler = self.sampler(lambda: self.dense_gradients(weights, 0))
            options = {"targets": task.targets, "train": task.train, "sampler": sampler}
            self.state = rosa_func.init(task.model, method.rank, key=cell.seed, **options)
        self.model = rosa_func.skeleton(task.model)  # the weights are in the state alone now
        self.optimizer = torch.optim.AdamW(self.groups(), weight_decay=0.0)
        leaves = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.trainable = sum(leaf.numel() for leaf in leaves)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the state of the moment."""
        return rosa_func.call(self.model, self.state, *args, **kwargs)

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by side, since a side may have a rate of its own or none."""
        method, sides = self.cell.method, {"input": [], "output": [], "full": []}
        for name, value in self.state["trainable"].items():
            if isinstance(value, Tensor):
                sides["full"].append(value)
            else:
                order = "AB" if int(self.state["input_dim", name]) == 0 else "BA"
                sides["input"].append(value[order[0]])
                sides["output"].append(value[order[1]])
        if method.train != "both":
            del sides["output" if method.train == "input" else "input"]
        rosa_func.parameters(self.state)  # sets requires_grad
        ratio = {"output": method.ratio}
        return [
            {"params": leaves, "times": ratio.get(side, 1.0)}
            for side, leaves in sides.items()
            if leaves
        ]

    def sampler(self, gradients: Callable[[], dict[str, Tensor]]) -> Sampler:
        """Return the method's sampler; `gradients` is called only where it is needed."""
        method = self.cell.method
        if method.sampler in ("aligned", "importance"):
            return getattr(draws, method.sampler)(gradients())
        sampler = getattr(rosa_func.samplers, method.sampler)
        return sampler if method.share == 0.5 else draws.shared(sampler, method.share)

    def dense_gradients(self, weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the gradient by every dense weight, over a few batches beside those trained on."""
        adapted = {n: w.detach().requires_grad_() for n, w in weights.items() if w.ndim >= 2}
        stream = self.task.batches(rosa_func.fold_in(self.cell.seed, "draw", step))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.model, weights | adapted, args, kwargs)

        losses = [self.task.loss(forward, batch) for batch in islice(stream, GRADIENT_BATCHES)]
        found = torch.autograd.grad(sum(losses), adapted.values(), allow_unused=True)
        return {n: g for n, g in zip(adapted, found, strict=True) if g is not None}

    def resample(self, step: int) -> None:
        """Begin a cycle; the schedule and the order of the data go on."""
        method = self.cell.method
        sampler = self.sampler(lambda: self.dense_gradients(rosa_func.merge(self.state), step))
        key = rosa_func.fold_in(self.cell.seed, step)
        new = rosa_func.resample(self.state, key, sampler=sampler)
        if not method.solve:
            pruned = {"fraction": PRUNED} if method.moments == "prune" else {}
            rosa_func.optim.rebind(
                self.optimizer, self.state, new, moments=method.moments, **pruned
            )
        self.state = new

    def train(self, batch: Any, rate: float) -> bool:
        """Take one step of AdamW; return whether all is still finite."""
        if self.cell.method.solve:
            self.task.solve(self.state)
            return True
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        self.model.train()
        loss = self.task.loss(self.forward, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        leaves = [p for group in self.optimizer.param_groups for p in group["params"]]
        return math.isfinite(loss.item() + sum(leaf.detach().sum().item() for leaf in leaves))

    def evaluate(self, split: str) -> Metrics:
        """Score the state of the moment, with dropout off."""
        self.model.eval()
        return self.task.evaluate(self.forward, split)

    def snapshot(self) -> TensorDict:
        """Return the state with copies of what is trained; the residuals are shared."""
        return self.state.replace({"trainable": self.state["trainable"].detach().clone()})


def everything(model: torch.nn.Module) -> TensorDict:
    """Return a state of which every parameter is trained in full."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return TensorDict({"frozen": buffers, "trainable": values, "input_dim": {}})


def spectrum(task: Task, state: TensorDict) -> dict[str, Any]:
    """Return the singular values of the total change over the largest, the mean over weights.

    The rank counts those above 1e-3 of the largest; the effective rank is exp(entropy).
    """
    before = dict(task.model.named_parameters())
    after = rosa_func.merge(state)
    matrices = [n for n, p in before.items() if p.ndim == 2 and "wte" not in n and "wpe" not in n]
    changes = {n: torch.linalg.svdvals(after[n] - before[n].detach()) for n in matrices}
    # Below that it is the rounding of a merge, not a change.
    rows = [S / S[0] for n, S in changes.items() if S[0] > 1e-5 * before[n].detach().norm()]
    if not rows:
        return {"rank": 0.0, "effective_rank": 0.0}
    shares = [S / S.sum() for S in rows]
    entropies = [-(p * p.clamp_min(1e-30).log()).sum() for p in shares]
    length = min(map(len, rows))
    mean = torch.stack([S[:length] for S in rows]).mean(0).tolist()
    return {
        "rank": sum(int((S > 1e-3).sum()) for S in rows) / len(rows),
        "effective_rank": sum(e.exp().item() for e in entropies) / len(rows),
        "spectrum": [float(f"{value:.3g}") for value in mean],
    }


def _described(cell: Cell) -> dict[str, Any]:
    """Return what a reader of the line needs to run the cell again."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    return {
        "method": cell.method._asdict(),
        "rate": cell.rate,
        "seed": cell.seed,
        "phase": cell.phase,
        "setting": cell.setting,
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
