"""Gradients of each sample, and training with differential privacy (DP-SGD).

    python -m examples.recipes.private [--short]

DP-SGD clips the gradient of each sample to a norm C, adds noise to the sum, and steps:

    g = sum_s min(1, C / |g_s|) g_s + sigma C N(0, I)

Three ways to the sum, which is the same: a backward pass for each sample; `vmap(grad)`, which holds
the gradients of all samples at once; and ghost norms. These need no gradient of a sample. For
tokens X into a weight, D the gradients of its outputs, and E = D B^T,

    |dA_s|^2 = |X_s^T E_s|^2 = sum_tu (X_s X_s^T)_tu (E_s E_s^T)_tu

and a second backward pass, of the losses weighted by min(1, C / |g_s|), gives the sum.

Sources: Abadi et al. 2016, "Deep learning with differential privacy"; Li et al. 2022, "Large
language models can be strong differentially private learners" (ghost norms).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.func import grad, vmap
from transformers import GPT2LMHeadModel

import rosa_func
from examples.recipes import costs, counting
from examples.recipes.accountant import epsilon
from examples.shared.options import of_a_recipe
from rosa_func import samplers

Gradients = list[Tensor]  # in the order of rosa_func.parameters(state)


def by_microbatches(model: GPT2LMHeadModel, state: TensorDict, ids: Tensor, C: float) -> Gradients:
    """Return the sum of the clipped gradients by a backward pass for each sample."""
    leaves = rosa_func.parameters(state)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for sample in ids:
        gradients = torch.autograd.grad(counting.loss(model, state, sample), leaves)
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for sum_, g in zip(total, gradients, strict=True):
            sum_.add_(g, alpha=min(1.0, C / size))
    return total


def by_vmap(model: GPT2LMHeadModel, state: TensorDict, ids: Tensor, C: float) -> Gradients:
    """Return the sum by the gradients of all samples at once."""

    def loss(trainable: TensorDict, sample: Tensor) -> Tensor:
        return counting.loss(model, state.replace(trainable=trainable), sample)

    each = vmap(grad(loss), in_dims=(None, 0))(state["trainable"].detach(), ids)
    gradients = [pair[side] for pair in each.values() for side in ("A", "B")]
    squares = sum(g.flatten(1).square().sum(1) for g in gradients)
    clip = (C / squares.sqrt()).clamp(max=1)
    return [torch.einsum("s,s...->...", clip, g) for g in gradients]


def by_ghost_norms(model: GPT2LMHeadModel, state: TensorDict, ids: Tensor, C: float) -> Gradients:
    """Return the sum by norms from what goes into a weight and what comes back to its outputs."""
    leaves = rosa_func.parameters(state)
    squares = torch.zeros(len(ids))
    hooks, adapted = [], rosa_func.adapted(model, state)  # hooks of the copy, not of the model

    def watch(name: str, inputs: tuple[Tensor], output: Tensor) -> None:
        add = partial(add_square_norms, squares, state, name, inputs[0].detach())
        hooks.append(output.register_hook(add))

    for name in state["trainable"].keys():
        owner = adapted.get_submodule(name.rpartition(".")[0])
        owner.register_forward_hook(lambda _, *both, name=name: watch(name, *both))
    logits = adapted(ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)
    torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
    for hook in hooks:
        hook.remove()
    clip = (C / squares.sqrt()).clamp(max=1)
    return list(torch.autograd.grad(losses @ clip, leaves))


def add_square_norms(squares: Tensor, state: TensorDict, name: str, X: Tensor, D: Tensor) -> None:
    """Add |dA_s|^2 + |dB_s|^2 of a weight; X and D are samples x tokens x features."""
    A, B = (state["trainable", name, side].detach() for side in ("A", "B"))
    left, right = (X, D) if state["input_dim", name] == 0 else (D, X)  # dW_s = left_s^T right_s
    for one, other in ((left, right @ B.mT), (left @ A, right)):
        squares += ((one @ one.mT) * (other @ other.mT)).sum((1, 2))


def train(
    model: GPT2LMHeadModel, data: Tensor, sigma: float, *, q: float, steps: int
) -> TensorDict:
    """Train a LoRA state by Adam on private sums; without clipping and noise where sigma is 0."""
    state = rosa_func.init(model, 2, sampler=samplers.lora)
    leaves = rosa_func.parameters(state)
    optimizer = torch.optim.Adam(leaves, 1e-2)
    generator = torch.Generator().manual_seed(0)
    C = 0.5 if sigma else math.inf
    for _ in range(steps):
        drawn = torch.rand(len(data), generator=generator) < q  # each sample for itself
        for leaf, g in zip(leaves, by_ghost_norms(model, state, data[drawn], C), strict=True):
            noise = torch.randn(g.shape, generator=generator) * sigma * C if sigma else 0
            leaf.grad = (g + noise) / (q * len(data))
        optimizer.step()
    return state


def main() -> None:
    """Compare the three ways, then train at several levels of noise."""
    args = of_a_recipe(__doc__, "a few steps and rounds", draws=False)
    steps, rounds = (3, 3) if args.short else (60, 9)
    wide = counting.counter(192, 4, steps=0)
    state = rosa_func.init(wide, 16)
    ids = counting.sequences(1, 32, 0)
    ways: dict[str, Callable[..., Gradients]] = {
        "microbatches": by_microbatches,
        "vmap(grad)": by_vmap,
        "ghost norms": by_ghost_norms,
    }
    expected = by_microbatches(wide, state, ids, C=0.5)
    largest = max(g.abs().max() for g in expected)
    for name in list(ways)[1:]:
        pairs = zip(ways[name](wide, state, ids, C=0.5), expected, strict=True)
        off = max((g - e).abs().max() for g, e in pairs) / largest
        print(f"the clipped sum by {name} differs from that of microbatches by {off:.1e}")
    print(f"\n{len(ids)} samples, {rosa_func.count(state).trainable:,} values train")
    work = {name: partial(way, wide, state, ids, C=0.5) for name, way in ways.items()}
    print(costs.table(costs.compared(work, rounds), against="microbatches"))

    model = counting.counter(steps=150)
    data, held_out = counting.sequences(3, 2048, 1), counting.sequences(3, 64, 2)
    print(f"\nDP-SGD: {len(data)} sequences, {steps} steps, delta = 1e-4")
    print(f"{'sigma':>6}{'epsilon':>9}{'held-out loss':>15}")
    start = rosa_func.init(model, 1, sampler=samplers.lora)
    print(f"{'start':>6}{'':9}{float(counting.loss(model, start, held_out)):>15.3f}")
    q = 128 / len(data)
    for sigma in (0.0, 1.0, 4.0):
        state = train(model, data, sigma, q=q, steps=steps)
        with torch.no_grad():
            loss = counting.loss(model, state, held_out)
        spent = epsilon(sigma, q, steps, 1e-4) if sigma else math.inf
        print(f"{sigma:>6.1f}{spent:>9.2f}{loss:>15.3f}")


if __name__ == "__main__":
    main()
