"""What an adapted forward pass costs in Python: many layers, hardly any arithmetic.

    python -m examples.benchmark.overhead            # under a minute
    python -m examples.benchmark.overhead --short    # fewer layers and rounds: does it run?

The model is a Llama of 32 layers by config, but 64 wide, and it reads 8 tokens without gradients
and without a cache. So the products take little of the time, and what is left is what each of
the 224 adapted weights costs to find, check and dispatch. The contenders:

    plain   the stock model
    peft    peft's LoRA on the same weights (needs `pip install "peft>=0.21"`)
    call    rosa_func.call
    bind    entering rosa_func.bind, one forward pass, leaving it
    bound   a forward pass inside a `bind` that has been entered already

They take turns in one process, in changing order. Of each contender the fastest round counts, since
whatever else the machine does only ever adds to a time; beside it are the median, and the least
processor time.
"""

import argparse
import copy
import os
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rosa_func
from examples.benchmark.contenders import Work, clocked, interleave, peft
from examples.shared.machine import cpu
from examples.shared.options import positive

RANK, TOKENS, WARMUP = 8, 8, 3
LAYERS, ROUNDS = 32, 30
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Target = tuple[str, float] | None
# Beyond the stock model's time, most of a ratio is Python.
RATIOS: tuple[tuple[str, str, Target], ...] = (
    ("call", "peft", ("at most", 1.0)),
    ("bind", "peft", None),
    ("bind", "plain", None),
    ("bound", "plain", None),
    ("call", "plain", None),
    ("peft", "plain", None),
)


class Figures(NamedTuple):
    """Of the rounds of a contender, in ms."""

    fastest: float
    median: float
    processor: float  # the least


def llama(layers: int) -> LlamaForCausalLM:
    """Build a narrow Llama with random weights; the global random state is put back."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def peft_lora(model: nn.Module) -> nn.Module:
    """Return a copy of the model with peft's LoRA, at the scale 1."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def enter_and_run(model: nn.Module, state: TensorDict, ids: Tensor) -> Tensor:
    """Bind the model, and run it once."""
    with rosa_func.bind(model, state) as bound:
        return bound(ids, use_cache=False).logits


def run_inside(model: nn.Module, state: TensorDict, ids: Tensor) -> dict[str, float]:
    """Bind the model, and time only what is inside."""
    with rosa_func.bind(model, state) as bound:
        return clocked(lambda: bound(ids, use_cache=False))


def contenders(layers: int) -> dict[str, Work]:
    """Make all contenders from one model; each gives its times."""
    base = llama(layers)
    state = rosa_func.init(base, RANK, targets=TARGETS)
    model = rosa_func.skeleton(base)
    ids = torch.randint(100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: base(ids, use_cache=False).logits,
        "call": lambda: rosa_func.call(model, state, ids, use_cache=False).logits,
        "bind": partial(enter_and_run, model, state, ids),
    }
    if peft is not None:
        adapted = peft_lora(base)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        values = sum(p.numel() for p in rosa_func.parameters(state))
        if trained != values:
            raise RuntimeError(f"peft would train {trained} values and ROSA {values}")
        runs["peft"] = lambda: adapted(ids, use_cache=False).logits
    for name, run in runs.items():  # none of them has been trained: all are the same function
        torch.testing.assert_close(run(), runs["plain"](), atol=1e-4, rtol=1e-4, msg=name)
    works: dict[str, Work] = {name: partial(clocked, run) for name, run in runs.items()}
    return works | {"bound": partial(run_inside, model, state, ids)}


def main() -> None:
    """Time every contender, and print the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, help=f"default {ROUNDS}")
    parser.add_argument("--layers", type=positive, help=f"default {LAYERS}")
    parser.add_argument("--short", action="store_true", help="2 layers and 3 rounds")
    args = parser.parse_args()
    layers = args.layers or (2 if args.short else LAYERS)
    rounds = args.rounds or (3 if args.short else ROUNDS)
    print(f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, rosa_func {rosa_func.__version__}", end="")
    print(f", peft {peft.__version__}" if peft else "; peft is not installed")
    print(f"{layers} layers, r={RANK}, {TOKENS} tokens, {rounds} rounds, no gradients")
    with torch.no_grad():
        times = interleave(contenders(layers), rounds, WARMUP, "forward pass")
    figures = {
        name: Figures(
            1e3 * min(of["seconds"]), 1e3 * median(of["seconds"]), 1e3 * min(of["processor"])
        )
        for name, of in times.items()
    }
    print(f"{'ms':14} {'fastest':>9} {'median':>9} {'processor':>9}")
    for name, of in figures.items():
        print(f"{name:14} {of.fastest:9.3f} {of.median:9.3f} {of.processor:9.3f}")
    judged = (layers, args.short) == (LAYERS, False)
    print("ratio")
    for over, under, target in RATIOS:
        if over not in figures or under not in figures:
            continue
        ratios = Figures(*(a / b for a, b in zip(figures[over], figures[under], strict=True)))
        line = f"{over + '/' + under:14} {ratios.fastest:9.3f} {ratios.median:9.3f}"
        line = f"{line} {ratios.processor:9.3f}"
        if target:
            verdict = "PASS" if ratios.fastest <= target[1] else "FAIL"
            line = f"{line}  {target[0]} {target[1]:g}: {verdict if judged else 'not judged'}"
        print(line)


if __name__ == "__main__":
    main()
