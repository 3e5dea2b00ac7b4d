"""Many adapters, one base: each row of a batch with its own, in training and in serving.

    python -m examples.recipes.adapters [--short]

Four tasks are learned at once. A batch has rows of all of them, `stacking.select` gives each row
the factors of its task, and the gradients go back to each. Two ROSA states, each trained alone in
draws of its own, then join them: `stacking.rebase` puts what they change on the model's own
weights. One pass serves rows of all six, as peft does with `adapter_names`: outputs, and times.
"""

import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import peft
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import GPT2LMHeadModel

import rosa_func
from examples.recipes import costs, counting
from examples.shared.options import of_a_recipe
from rosa_func import export, samplers, stacking

TASKS = (2, 3, 5, 7)  # by how much to count
ALONE = (11, 13)  # trained one by one, in draws of their own
RATE = 1e-2


def train_together(model: GPT2LMHeadModel, steps: int) -> list[TensorDict]:
    """Train an adapter for each task on batches with rows of all; return their states."""
    ranks = (2, 4, 8, 8)
    states = [rosa_func.init(model, r, key=r, sampler=samplers.lora) for r in ranks]
    stacked = stacking.stack(states)
    losses = stacking.vmap(partial(counting.loss, model))
    optimizer = torch.optim.AdamW(rosa_func.parameters(stacked), RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(TASKS), (16,), generator=generator)
        ids = counting.sequences(torch.tensor(TASKS)[rows], len(rows), 1000 + step)
        optimizer.zero_grad()
        losses(stacking.select(stacked, rows), ids).mean().backward()
        optimizer.step()
    return stacking.unstack(stacked)


def train_alone(model: GPT2LMHeadModel, by: int, steps: int) -> TensorDict:
    """Train a ROSA state, with a resample in the middle."""
    state = rosa_func.init(model, 4, key=by)
    for cycle in range(2):
        state = rosa_func.resample(state, by + cycle) if cycle else state
        optimizer = torch.optim.AdamW(rosa_func.parameters(state), RATE, weight_decay=0.0)
        for step in range(steps // 2):
            optimizer.zero_grad()
            counting.loss(model, state, counting.sequences(by, 8, 2000 + step)).backward()
            optimizer.step()
    return state


class Served:
    """Logits of a batch, each row with its own adapter."""

    def __init__(self, model: GPT2LMHeadModel, states: Sequence[TensorDict]) -> None:
        """Stack the states."""
        self.stacked = stacking.stack(states)
        self.each = stacking.vmap(
            lambda state, ids: rosa_func.call(model, state, ids[None], use_cache=False).logits[0]
        )

    @torch.no_grad()
    def __call__(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return rows x tokens x vocabulary."""
        return self.each(stacking.select(self.stacked, rows), ids)


class ServedByPeft:
    """The same by peft."""

    def __init__(self, model: GPT2LMHeadModel, states: Sequence[TensorDict]) -> None:
        """Write the states as adapters of peft, and load them into one model."""
        base = export.to_module(model, rosa_func.init(model, 1, sampler=samplers.lora))
        with tempfile.TemporaryDirectory() as folder:
            for place, state in enumerate(states):
                path, name = Path(folder) / str(place), str(place)
                export.to_peft(path, model, state)
                if place:
                    self.model.load_adapter(path, name)
                else:
                    self.model = peft.PeftModel.from_pretrained(base, path, name)
        self.model.eval()

    @torch.no_grad()
    def __call__(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return rows x tokens x vocabulary."""
        names = [str(row) for row in rows.tolist()]
        return self.model(ids, use_cache=False, adapter_names=names).logits


@torch.no_grad()
def one_by_one(
    model: GPT2LMHeadModel, states: Sequence[TensorDict], rows: Tensor, ids: Tensor
) -> Tensor:
    """Return the same by a pass for each adapter that is asked for."""
    logits = torch.empty(*ids.shape, counting.NUMBERS)
    for row in rows.unique().tolist():
        chosen = rows == row
        logits[chosen] = rosa_func.call(model, states[row], ids[chosen], use_cache=False).logits
    return logits


def main() -> None:
    """Train, serve, and compare with peft."""
    args = of_a_recipe(__doc__, "a few steps and rounds", draws=False)
    steps, rounds = (20, 3) if args.short else (150, 9)
    model = counting.counter(steps=steps)
    states = train_together(model, steps) + [train_alone(model, by, steps) for by in ALONE]

    tasks = TASKS + ALONE
    print("loss of each state (a row) on each task (a column)\n" + " " * 7, end="")
    print("".join(f"{by:>7}" for by in tasks))
    with torch.no_grad():
        for by, state in zip(tasks, states, strict=True):
            tests = [counting.sequences(other, 16, 9000) for other in tasks]
            print(f"{by:>7}" + "".join(f"{counting.loss(model, state, t):>7.3f}" for t in tests))

    based = [*states[: len(TASKS)], *(stacking.rebase(s, model) for s in states[len(TASKS) :])]
    ranks = [max(p["A"].shape[-1] for p in state["trainable"].values()) for state in based]
    print(f"\nranks on the model's own weights: {', '.join(map(str, ranks))}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft and transformers, about their own code
        by_peft = ServedByPeft(model, states)
    served = Served(model, based)
    for count in (12, 48):
        rows = torch.arange(count) % len(states)
        ids = counting.sequences(torch.tensor(tasks)[rows], count, 5000)
        ways = {
            "one pass, by vmap": partial(served, rows, ids),
            "peft, adapter_names": partial(by_peft, rows, ids),
            "a pass for each": partial(one_by_one, model, states, rows, ids),
        }
        expected = ways["a pass for each"]()
        size = expected.abs().max()
        print(f"\n{count} rows of {counting.LENGTH} tokens, {len(states)} adapters")
        for name in list(ways)[:2]:
            difference = (ways[name]() - expected).abs().max() / size
            print(f"{name}: logits differ from those of a pass for each by {difference:.1e}")
        print(costs.table(costs.compared(ways, rounds), against="peft, adapter_names"))


if __name__ == "__main__":
    main()
