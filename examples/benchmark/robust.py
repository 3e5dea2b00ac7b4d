"""Speed and memory of robust adaptation, W = R + A B + S, beside peft's sparse tuners.

    python -m examples.benchmark.robust                   # about 20 minutes on 2 cores
    python -m examples.benchmark.robust --parts products  # one of the parts below
    python -m examples.benchmark.robust --short           # tiny sizes, under a minute: does it run?

    step      a training step of GPT-2 small, its 48 weights with rank 8 and a sparse part, beside
              the frozen model (forward, and backward to the inputs) and full fine-tuning
    scores    the scores of all 48 weights, beside full fine-tuning's forward and backward passes
    linear    two linear layers, one thread, beside peft's SHiRA, Super-Tuning and Supra
              (Super-Tuning with a low-rank part) with about as many values; then the peak memory of
              each in a process of its own
    products  the gradient of the sparse values alone: its entries one by one, or the whole
              weight's and a gather, as `is_sampled` in rosa_func/weight/sampled.py chooses

Random weights, float32, AdamW. The contenders take turns in one process, in changing order, and of
each the fastest round counts. Supports are random: their places do not change the time by much.
Comparisons with peft need `pip install "peft>=0.21"`.
"""

import argparse
import copy
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from examples.benchmark.contenders import (
    TINY,
    Batch,
    Contender,
    Times,
    adamw,
    clocked,
    frozen,
    full,
    gpt2,
    interleave,
    peft,
    rosa_of,
    tokens,
    train_step,
    trainable_values,
)
from examples.benchmark.fresh_process import RETURNED, in_a_process
from examples.shared.machine import cpu
from examples.shared.options import positive
from examples.shared.peak_memory import peak_memory_of_this_process, reset_peak_memory
from rosa_func import sparse
from rosa_func.weight import sampled

RANK, DENSITIES, BATCHES = 8, (0.005, 0.02), 4
PAIRS = ("sparse", "SHiRA"), ("sparse", "Super-Tuning"), ("robust", "Supra")
PARTS = ("step", "scores", "linear", "products")


class Settings(NamedTuple):
    """The size of a run."""

    model: dict[str, int]  # of GPT2Config
    batch: Batch
    widths: tuple[int, int]  # of the two linear layers, and within
    tokens: int
    rounds: int
    warmup: int
    repeats: int  # processes for each figure of memory
    judged: bool


FULL = Settings({}, (4, 512), (768, 3072), 2048, rounds=9, warmup=2, repeats=3, judged=True)
SHORT = Settings(TINY.model, (2, 32), (32, 64), 64, rounds=3, warmup=1, repeats=1, judged=False)


def robust_state(model: nn.Module, density: float, rank: int = RANK) -> TensorDict:
    """Return a state with factors and a sparse part."""
    state = rosa_func.init(model, rank)
    return sparse.add(state, sparse.support_random(state, density, key=0))


def show(what: str, times: Times, over: str, under: str, key: str, bar: float | None) -> None:
    """Print the ratio of the fastest rounds of two contenders."""
    a, b = min(times[over][key]), min(times[under][key])
    text = f"{what:9} {over + ' / ' + under:38} {a:9.4g} / {b:<9.4g} {a / b:7.3f}"
    if bar is not None:
        text = f"{text}  at most {bar:g}: {'PASS' if a <= bar * b else 'FAIL'}"
    print(text, flush=True)


def step(s: Settings) -> None:
    """Time steps of GPT-2."""
    base = gpt2(s.model)
    batch = tokens(base.config, s.batch)
    contenders = {"frozen": frozen(copy.deepcopy(base), 0), "full": full(copy.deepcopy(base), 0)}
    for d in DENSITIES:
        contenders[f"robust {d:.1%}"] = rosa_of(rosa_func.skeleton(base), robust_state(base, d))
    work = {n: partial(train_step, contender, *batch) for n, contender in contenders.items()}
    times = interleave(work, s.rounds, s.warmup, "step")
    low, high = (f"robust {d:.1%}" for d in DENSITIES)
    bars = (1.25, 1.4, 0.8) if s.judged else (None, None, None)
    pairs = (low, "frozen"), (high, "frozen"), (low, "full")
    for pair, bar in zip(pairs, bars, strict=True):
        show("step", times, *pair, "step", bar)
    for name in (low, high):
        slots = [slot for of in contenders[name].optimizer.state.values() for slot in of.values()]
        held = sum(slot.numel() for slot in slots if slot.ndim)
        print(f"optimizer {name:38} {held:9,} values, twice {trainable_values(contenders[name]):,}")


def scores(s: Settings) -> None:
    """Time the scores of all weights."""
    base = gpt2(s.model)
    batches = [tokens(base.config, s.batch) for _ in range(BATCHES)]
    state, whole = rosa_func.init(base, RANK), copy.deepcopy(base)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def passes() -> None:
        for batch in batches:
            whole.zero_grad()
            loss(whole, batch).backward()

    work = {
        "scores": partial(clocked, partial(sparse.scores, base, state, batches, loss)),
        "full": partial(clocked, passes),
    }
    times = interleave(work, max(3, s.rounds // 3), 1, "scores")
    show("scores", times, "scores", "full", "seconds", 1.3 if s.judged else None)
    show("processor", times, "scores", "full", "processor", None)


def layers(widths: tuple[int, int]) -> nn.Sequential:
    """Make two linear layers; the global random state is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width, within = widths
        return nn.Sequential(nn.Linear(width, within), nn.ReLU(), nn.Linear(within, width))


def tuner(config: Callable[..., Any], **options: Any) -> Callable[[nn.Module], Contender]:
    """Return what makes a contender of one of peft's tuners."""

    def make(model: nn.Module) -> Contender:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own use of others
            adapted = peft.get_peft_model(model, config(target_modules=["0", "2"], **options))
        return Contender(adapted, adamw([p for p in adapted.parameters() if p.requires_grad]))

    return make


def alone(model: nn.Module) -> Contender:
    """Train nothing."""
    return Contender(model.requires_grad_(False), None)


def ours(model: nn.Module, density: float, rank: int) -> Contender:
    """Train a sparse part, and factors unless the rank is 0, and let the model go."""
    state, inside = robust_state(model, density, rank), rosa_func.skeleton(model)
    return Contender(partial(rosa_func.call, inside, state), adamw(rosa_func.parameters(state)))


def of_linear(widths: tuple[int, int]) -> dict[str, Callable[[nn.Module], Contender]]:
    """Return what makes the contenders, those of a density with about as many values."""
    found: dict[str, Callable[[nn.Module], Contender]] = {"frozen": alone}
    found["full"] = lambda model: Contender(model, adamw(model.parameters()))
    for d in DENSITIES:
        found[f"sparse {d:.1%}"] = partial(ours, density=d, rank=0)
        found[f"robust {d:.1%}"] = partial(ours, density=d, rank=RANK)
        if peft is not None:
            k = max(1, round(d * widths[0] * widths[1] / sum(widths)))  # it takes k (m + n) values
            found[f"SHiRA {d:.1%}"] = tuner(peft.ShiraConfig, r=k)
            found[f"Super-Tuning {d:.1%}"] = tuner(peft.SupertuningConfig, sparsity=1 - d)
            found[f"Supra {d:.1%}"] = tuner(peft.SupertuningConfig, sparsity=1 - d, r=RANK)
    return found


def train_layers(contender: Contender, x: Tensor) -> None:
    """Run one step."""
    if contender.optimizer:
        contender.optimizer.zero_grad()
    contender.logits(x).square().mean().backward()
    if contender.optimizer:
        contender.optimizer.step()


def linear(s: Settings) -> None:
    """Time two linear layers on one thread, and measure their memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base, makers = layers(s.widths), of_linear(s.widths)
    x = torch.randn(s.tokens, s.widths[0], generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    work = {
        name: partial(clocked, partial(train_layers, make(copy.deepcopy(base)), x))
        for name, make in makers.items()
    }
    times = interleave(work, s.rounds, s.warmup, "linear")
    torch.set_num_threads(threads)
    densities = DENSITIES if s.judged else DENSITIES[:1]  # each figure is a new process
    pairs = [(f"{a} {d:.1%}", f"{b} {d:.1%}") for d in densities for a, b in PAIRS]
    names = [name for pair in pairs for name in pair if name in makers]
    compared = pairs if peft is not None else []
    for pair in compared:
        show("linear", times, *pair, "seconds", 0.8 if s.judged else None)
    for d in DENSITIES:
        show("linear", times, f"robust {d:.1%}", "frozen", "seconds", None)
    show("linear", times, "full", "frozen", "seconds", None)
    jobs = {name: json.dumps([name, *s.widths, s.tokens]) for name in names}
    module = "examples.benchmark.robust"
    runs = {
        n: partial(in_a_process, module, "--measure", job, **RETURNED) for n, job in jobs.items()
    }
    peaks = interleave(runs, s.repeats, 0, "peak memory")
    for pair in compared:
        show("peak MiB", peaks, *pair, "above", 1.0 if s.judged else None)


def measure(name: str, width: int, within: int, count: int) -> dict[str, float]:
    """Train three steps in this process; return its peak memory above what it held, in MiB."""
    contender = of_linear((width, within))[name](layers((width, within)))
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reset_peak_memory()
    before = peak_memory_of_this_process()
    for _ in range(3):
        train_layers(contender, x)
    peak = peak_memory_of_this_process()
    return {"peak": peak, "above": peak - before}


def products(s: Settings) -> None:
    """Time both ways to the gradient of sparse values, by density and by tokens."""
    m, n = s.widths
    print(f"products of {m} x {n}, {torch.get_num_threads()} threads: sampled / dense, by tokens")
    for density in (0.002, 0.005, 0.02, 0.05, 0.1, 0.2):
        places = torch.randperm(m * n, generator=torch.Generator().manual_seed(0))
        support = places[: max(1, int(density * m * n))].sort().values.int()
        ratios = []
        for count in (s.tokens // 16, s.tokens // 4, s.tokens, 2 * s.tokens):
            left, right = torch.randn(count, m), torch.randn(count, n)
            work = {
                way.__name__: partial(clocked, partial(way, left, right, support))
                for way in (sampled.entries_one_by_one, sampled.entries_of_the_whole)
            }
            times = interleave(work, s.rounds, s.warmup, "products")
            fast = [min(of["seconds"]) for of in times.values()]
            ratios.append(f"{count}: {fast[0] / fast[1]:.2f}")
        chosen = "sampled" if sampled.is_sampled(density, left.device) else "dense"
        print(f"{density:8.1%}  {'  '.join(ratios)}   {chosen}")


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default all")
    parser.add_argument("--rounds", type=positive, help=f"default {FULL.rounds}")
    parser.add_argument("--short", action="store_true", help="tiny sizes and few rounds")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # for the processes made here
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return
    s = SHORT if args.short else FULL
    s = s._replace(rounds=args.rounds or s.rounds)
    print(f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, rosa_func {rosa_func.__version__}", end="")
    print(f", peft {peft.__version__}" if peft else "; peft is not installed")
    print("the fastest of each in seconds, and their ratio")
    for part in PARTS:
        if part in args.parts:
            {"step": step, "scores": scores, "linear": linear, "products": products}[part](s)


if __name__ == "__main__":
    main()
