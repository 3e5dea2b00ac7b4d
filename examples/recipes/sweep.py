"""A sweep as one batch: rank x rate x seed, all members trained at once by `vmap`.

    python -m examples.recipes.sweep [--short]

The members are LoRA states of one model. `stacking.stack` makes one state of them: the weights of
the model are in it once, and factors of smaller ranks are filled up with zeros, which stay zeros. A
step is one forward and one backward pass, and the losses are those of training one after another.
It takes less time where a pass is short: a pass has its price in Python and in small products, and
members beyond the first do not pay it. No sweep can be quicker than one adapter on the rows of all.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import peft
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import GPT2LMHeadModel

import rosa_func
from examples.recipes import costs, counting
from examples.shared.options import of_a_recipe
from rosa_func import samplers, stacking


class Member(NamedTuple):
    """What tells one member of the sweep from another."""

    rank: int
    rate: float
    seed: int


Members = Sequence[Member]
GRID = [Member(*choice) for choice in product((2, 8), (1e-3, 1e-2), (0, 1))]


def start(model: GPT2LMHeadModel, members: Members) -> list[TensorDict]:
    """Return the states of members."""
    return [rosa_func.init(model, m.rank, key=m.seed, sampler=samplers.lora) for m in members]


class Together:
    """All members at once."""

    def __init__(self, model: GPT2LMHeadModel, members: Members) -> None:
        """Stack the states; for the optimizer each member's slices are a group with its rate."""
        self.stacked = stacking.stack(start(model, members))
        self.losses = stacking.vmap(partial(counting.loss, model), in_dims=(0, None))
        self.leaves = rosa_func.parameters(self.stacked)
        self.slices = [[leaf.detach()[i] for leaf in self.leaves] for i in range(len(members))]
        groups = [{"params": s, "lr": m.rate} for s, m in zip(self.slices, members, strict=True)]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def step(self, ids: Tensor) -> Tensor:
        """Train one step on the same rows; return the loss of each member."""
        losses = self.losses(self.stacked, ids)
        gradients = torch.autograd.grad(losses.sum(), self.leaves)  # each member's of its own loss
        for slices, own in zip(self.slices, zip(*gradients, strict=True), strict=True):
            for leaf, g in zip(slices, own, strict=True):
                leaf.grad = g.contiguous()  # the fused Adam reads memory in order, whatever strides
        self.optimizer.step()
        return losses.detach()


class OneByOne:
    """One member after another, each as in any training loop."""

    def __init__(
        self,
        members: Members,
        losses: list[Callable[[Tensor], Tensor]],
        leaves: list[list[Tensor]],
    ) -> None:
        """Take the loss of each member, and what it trains."""
        self.losses = losses
        self.optimizers = [
            torch.optim.Adam(own, m.rate, fused=True)
            for m, own in zip(members, leaves, strict=True)
        ]

    def step(self, ids: Tensor) -> Tensor:
        """Train one step of each member; return their losses."""
        found = []
        for loss, optimizer in zip(self.losses, self.optimizers, strict=True):
            optimizer.zero_grad()
            value = loss(ids)
            value.backward()
            optimizer.step()
            found.append(value.detach())
        return torch.stack(found)


def by_loop(model: GPT2LMHeadModel, members: Members) -> OneByOne:
    """Return the members as states of their own."""
    states = start(model, members)
    losses = [partial(counting.loss, model, state) for state in states]
    return OneByOne(members, losses, [rosa_func.parameters(state) for state in states])


def by_peft(model: GPT2LMHeadModel, members: Members) -> OneByOne:
    """Return the members as models of peft, which start from other random numbers."""
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    configs = [peft.LoraConfig(r=m.rank, lora_alpha=m.rank, **targets) for m in members]
    models = [peft.get_peft_model(copy.deepcopy(model), config) for config in configs]

    def loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
        return counting.loss_of(model(ids, use_cache=False).logits, ids)

    trained = [[p for p in m.parameters() if p.requires_grad] for m in models]
    return OneByOne(members, [partial(loss, m) for m in models], trained)


def main() -> None:
    """Sweep at once and one by one, and compare losses, time and memory."""
    args = of_a_recipe(__doc__, "a few steps and rounds", draws=False)
    steps, rounds = (20, 3) if args.short else (100, 9)
    model = counting.counter(steps=steps)
    together, loop = Together(model, GRID), by_loop(model, GRID)
    batches = [counting.sequences(3, 4, 1000 + step) for step in range(steps)]
    found, expected = (torch.stack([way.step(ids) for ids in batches]) for way in (together, loop))

    print("to count by threes: the mean loss of the last ten steps")
    print(f"{'rank':>4}{'rate':>8}{'seed':>6}{'at once':>10}{'by a loop':>11}")
    for member, *both in zip(GRID, found[-10:].mean(0), expected[-10:].mean(0), strict=True):
        print("{:>4}{:>8}{:>6}".format(*member) + "{:>10.5f}{:>11.5f}".format(*both))
    print(f"losses of all steps differ by {(found - expected).abs().max():.1e} at most")
    r, factors = GRID[0].rank, together.stacked["trainable"][0].detach().values()
    filled = max(max(p["A"][:, r:].abs().max(), p["B"][r:].abs().max()) for p in factors)
    print(f"the largest of what fills up rank 2 to 8: {filled:.1f}\n")

    for width, layers, rows in ((64, 2, 4), (128, 4, 2), (192, 4, 2), (192, 4, 4)):
        model = counting.counter(width, layers, steps=0)
        ids = counting.sequences(3, rows, 0)
        work = {
            "at once, by vmap": partial(Together(model, GRID).step, ids),
            "one by one": partial(by_loop(model, GRID).step, ids),
            "peft, one by one": partial(by_peft(model, GRID).step, ids),
            "one adapter, rows of all": partial(
                by_loop(model, GRID[-1:]).step, ids.repeat(len(GRID), 1)
            ),
        }
        tokens = f"{len(ids)} x {counting.LENGTH} tokens"
        print(f"a step of {len(GRID)} members: {layers} layers, {width} wide, {tokens}")
        print(costs.table(costs.compared(work, rounds), against="one by one") + "\n")


if __name__ == "__main__":
    main()
