"""A sweep as one batch: rank x rate x seed, all members trained at once by `vmap`.

    python -m examples.recipes.sweep [--short]

The members are LoRA states of one model. `stacking.stack` makes one state of them: the weights of
the model are in it once, and factors of smaller ranks are filled up with zeros, which stay zeros. A
step is one forward and one backward pass, and one update with a rate for each member. The losses
are those of training one after another, in less time where a pass is short: a pass has its price in
Python and in small products, and members beyond the first do not pay it.
"""

import argparse
import copy
from collections.abc import Callable
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
from rosa_func import samplers, stacking

Loss = Callable[[TensorDict, Tensor], Tensor]


class Member(NamedTuple):
    """What tells one member of the sweep from another."""

    rank: int
    rate: float
    seed: int


GRID = [Member(*choice) for choice in product((2, 8), (1e-3, 1e-2), (0, 1))]


def start(model: GPT2LMHeadModel) -> list[TensorDict]:
    """Return the states of all members."""
    return [rosa_func.init(model, m.rank, key=m.seed, sampler=samplers.lora) for m in GRID]


class Together:
    """All members at once."""

    def __init__(self, loss: Loss, states: list[TensorDict], rates: Tensor) -> None:
        """Stack the states; Adam is by hand, for torch's has one rate for all members."""
        self.stacked = stacking.stack(states)
        self.losses = stacking.vmap(loss, in_dims=(0, None))
        self.leaves = rosa_func.parameters(self.stacked)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.leaves]
        self.rates, self.steps = rates.view(-1, 1, 1), 0

    def step(self, ids: Tensor) -> Tensor:
        """Train one step on the same rows; return the loss of each member."""
        losses = self.losses(self.stacked, ids)
        gradients = torch.autograd.grad(losses.sum(), self.leaves)  # each member's of its own loss
        self.steps += 1
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        with torch.no_grad():
            for p, g, (mean, square) in zip(self.leaves, gradients, self.moments, strict=True):
                mean.lerp_(g, 0.1)
                square.mul_(0.999).addcmul_(g, g, value=0.001)
                p -= self.rates / first * mean / ((square / second).sqrt() + 1e-8)
        return losses.detach()


class OneByOne:
    """One member after another, each as in any training loop."""

    def __init__(self, losses: list[Callable[[Tensor], Tensor]], leaves: list[list[Tensor]]):
        """Take the loss of each member, and what it trains."""
        self.losses = losses
        self.optimizers = [
            torch.optim.Adam(own, member.rate) for member, own in zip(GRID, leaves, strict=True)
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


def by_loop(loss: Loss, states: list[TensorDict]) -> OneByOne:
    """Return the members as states of their own."""
    return OneByOne([partial(loss, s) for s in states], [rosa_func.parameters(s) for s in states])


def by_peft(model: GPT2LMHeadModel) -> OneByOne:
    """Return the members as models of peft, which start from other random numbers."""
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    models = [
        peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=m.rank, lora_alpha=m.rank, **targets)
        )
        for m in GRID
    ]

    def loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
        return counting.loss_of(model(ids, use_cache=False).logits, ids)

    trained = [[p for p in m.parameters() if p.requires_grad] for m in models]
    return OneByOne([partial(loss, m) for m in models], trained)


def base_alone(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Run the base forward and back on the rows of all members, the least that a sweep must do."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    embeddings = frozen.transformer.wte(ids.repeat(len(GRID), 1)).requires_grad_()
    logits = frozen(inputs_embeds=embeddings, use_cache=False).logits
    loss = counting.loss_of(logits, ids.repeat(len(GRID), 1))
    return torch.autograd.grad(loss, embeddings)[0]


def main() -> None:
    """Sweep at once and one by one, and compare losses, time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps and rounds")
    steps, rounds = (20, 3) if parser.parse_args().short else (100, 9)
    model = counting.counter(steps=steps)
    loss = partial(counting.loss, model)
    rates = torch.tensor([member.rate for member in GRID])
    together, loop = Together(loss, start(model), rates), by_loop(loss, start(model))
    batches = [counting.sequences(3, 4, 1000 + step) for step in range(steps)]
    found, expected = (torch.stack([way.step(ids) for ids in batches]) for way in (together, loop))

    print("to count by threes: the mean loss of the last ten steps")
    print(f"{'rank':>4}{'rate':>8}{'seed':>6}{'at once':>10}{'by a loop':>11}")
    for member, *both in zip(GRID, found[-10:].mean(0), expected[-10:].mean(0), strict=True):
        print("{:>4}{:>8}{:>6}".format(*member) + "{:>10.5f}{:>11.5f}".format(*both))
    print(f"losses of all steps differ by {(found - expected).abs().max():.1e} at most")
    first = together.stacked["trainable"][0].detach()
    rest = [
        part for p in first.values() for part in (p["A"][:, GRID[0].rank :], p["B"][GRID[0].rank :])
    ]
    print(f"the largest of what fills up rank 2 to 8: {max(t.abs().max() for t in rest):.1f}\n")

    for width, layers in ((64, 2), (192, 4)):
        model = counting.counter(width, layers, steps=0)
        loss, ids = partial(counting.loss, model), counting.sequences(3, 4, 0)
        ways = {
            "at once, by vmap": Together(loss, start(model), rates).step,
            "one by one": by_loop(loss, start(model)).step,
            "peft, one by one": by_peft(model).step,
            "the base alone, at once": partial(base_alone, model),
        }
        work = {name: partial(way, ids) for name, way in ways.items()}
        tokens = f"{len(ids)} x {counting.LENGTH} tokens"
        print(f"a step of {len(GRID)} members: {layers} layers, {width} wide, {tokens}")
        print(costs.table(costs.compared(work, rounds), against="one by one") + "\n")


if __name__ == "__main__":
    main()
