"""An ensemble: several states of one model, trained and evaluated at once by `vmap`.

    python -m examples.ensemble [--members 3] [--short] [--cache DIR]

Adapts the base model of the quickstart to source code. The members differ in their keys alone: each
trains in random subspaces of its own. Together, by the mean of their probabilities, they are better
than they are on average: by how much is what an ensemble brings.
"""

import argparse
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor

import rosa_func
from examples.quickstart import RATES
from examples.shared.options import folder, positive
from examples.shared.small_gpt2 import (
    SHORT,
    Base,
    Budget,
    base_and_data,
    perplexity,
    progress,
    schedule,
    total_nll,
)


def main() -> None:
    """Train all members at once, and compare each of them with all together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=positive, default=3, help="how many states")
    parser.add_argument("--short", action="store_true", help="a tiny model and a few dozen steps")
    parser.add_argument("--cache", type=folder, default="runs/quickstart", help="the base model's")
    args = parser.parse_args()
    base, budget = SHORT if args.short else (Base(), Budget())
    _, model, data = base_and_data(base, budget, args.cache)
    model.set_attn_implementation("eager")  # fused attention is slow under vmap, and torch warns

    def logits(state: TensorDict, ids: Tensor) -> Tensor:
        return rosa_func.call(model, state, ids, use_cache=False).logits

    def loss(state: TensorDict, ids: Tensor) -> Tensor:
        return total_nll(logits(state, ids), ids) / ids[:, 1:].numel()

    members = [rosa_func.init(model, budget.rank, key=key) for key in range(args.members)]
    stacked = torch.stack(members)  # one state, with one more dimension in each of its tensors
    optimizer = torch.optim.AdamW(rosa_func.parameters(stacked), weight_decay=0.0)
    with progress(f"{args.members} members", data) as bar:
        for ids, rate in (batch for epoch in schedule(data, RATES["rosa"]) for batch in epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = torch.func.vmap(loss, in_dims=(0, None))(stacked, ids)
            optimizer.zero_grad()
            losses.sum().backward()  # of the sum a member gets the gradient of its own loss
            optimizer.step()
            bar.update(ids.numel())

    for number, state in enumerate(stacked.detach().unbind(0)):  # a state each, as any other
        print(
            f"member {number}: held-out ppl {perplexity(partial(logits, state), data.held_out):.2f}"
        )

    def together(ids: Tensor) -> Tensor:
        each = torch.func.vmap(logits, in_dims=(0, None))(stacked.detach(), ids)
        return each.softmax(-1).mean(0).log()

    print(f"their mean: held-out ppl {perplexity(together, data.held_out):.2f}")


if __name__ == "__main__":
    main()
