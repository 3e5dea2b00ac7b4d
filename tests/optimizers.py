"""Optimizers to rebind: torch's, and small ones that keep the slots of those of other packages."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn, optim

import rosa_func
from models import randn, seeded

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(optim.SGD, lr=1e-2),
    "momentum": partial(optim.SGD, lr=1e-2, momentum=0.9),
    "Adam": partial(optim.Adam, lr=1e-2),
    "AdamW": partial(optim.AdamW, lr=1e-2, weight_decay=0.0, amsgrad=True),
    "NAdam": partial(optim.NAdam, lr=1e-2),
    "RAdam": partial(optim.RAdam, lr=1e-2),
    "Adagrad": partial(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "Adafactor": partial(optim.Adafactor, lr=1e-2),
    "RMSprop": partial(optim.RMSprop, lr=1e-2, centered=True, momentum=0.5),
    "Adadelta": partial(optim.Adadelta, lr=1e-2),
    "Adamax": partial(optim.Adamax, lr=1e-2),
    "ASGD": partial(optim.ASGD, lr=1e-2),
    "Rprop": partial(optim.Rprop, lr=1e-2),
}
NOT_KEPT = ["ASGD"]  # its average is one of weights
PROJECTED = ["SGD", "momentum", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adafactor"]
MODES: dict[str, dict[str, Any]] = {
    "reset": {},
    "keep": {},
    "prune": {"fraction": 0.5},
    "project": {},
}


def make_model() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)))


def make_state(r: int = 2, **options: Any) -> TensorDict:
    return rosa_func.init(make_model(), r, train="*.bias", **options)


def train(optimizer: torch.optim.Optimizer, state: TensorDict, steps: range) -> None:
    """Take steps on data that depends on the step alone."""
    model = make_model()
    for step in steps:
        x, y = randn(8, 7, seed=step), randn(8, 5, seed=100 + step)
        optimizer.zero_grad()
        (rosa_func.call(model, state, x) - y).square().mean().backward()
        optimizer.step()


def trained(name: str, r: int = 2, steps: int = 4) -> tuple[torch.optim.Optimizer, TensorDict]:
    state = make_state(r)
    optimizer = OPTIMIZERS[name](rosa_func.parameters(state))
    train(optimizer, state, range(steps))
    return optimizer, state


def optimizer_snapshot(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def identical(one: Any, other: Any) -> bool:
    """Compare two state dicts bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


class Quantised(Tensor):
    """A tensor of int8 codes and a scale, of which torch can compute nothing, like torchao's."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.scale = values.abs().max().clamp_min(1e-12) / 127
        self.codes = (values / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        raise NotImplementedError(f"{func} of a quantised tensor")

    def values(self) -> Tensor:
        return self.codes * self.scale


class Keeping(torch.optim.Optimizer):
    """Gradient descent that keeps slots for each tensor, made when it is first seen."""

    def __init__(self, params: Iterable[Any], **slots: Callable[[Tensor], Any]) -> None:
        super().__init__(params, {"lr": 1e-2})
        self.slots = slots

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    for slot, make in self.slots.items():
                        if slot not in self.state[p]:
                            self.state[p][slot] = make(p)
                    p.sub_(group["lr"] * p.grad)


class QuantisedAdam(torch.optim.Optimizer):
    """Adam with quantised moments, in the slots and types of torchao's AdamW8bit."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                slots: dict[str, Any] = self.state[p]
                if not slots:
                    slots["step"] = torch.tensor(0.0)
                    slots |= {s: Quantised(torch.zeros_like(p)) for s in ("exp_avg", "exp_avg_sq")}
                slots["step"] += 1
                t, m, v = slots["step"], slots["exp_avg"].values(), slots["exp_avg_sq"].values()
                m, v = m.lerp(p.grad, 0.1), v.lerp(p.grad.square(), 1e-3)
                p.sub_(group["lr"] * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
                slots["exp_avg"], slots["exp_avg_sq"] = Quantised(m), Quantised(v)


class GroupCounted(torch.optim.Adam):
    """Adam that counts its steps in the group, as apex's FusedAdam and schedule-free methods do."""

    def __init__(self, params: Iterable[Any], count: str) -> None:
        super().__init__(params, lr=1e-2)
        self.count = count

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group[self.count] = group.get(self.count, 0) + 1


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, with a state of its own, as SAM and most Lookaheads are."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside
        self.param_groups = (
            inside[0].param_groups if isinstance(inside, list) else inside.param_groups
        )
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inside.step()


class Passing(Wrapper):
    """A wrapper that shows the state of the optimizer inside, as accelerate's does."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inside.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inside.param_groups
