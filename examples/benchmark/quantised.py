"""Quantised residuals: bytes, time, memory and error, beside dense ones.

    python -m examples.benchmark.quantised                   # about 5 minutes on 2 cores
    python -m examples.benchmark.quantised --parts samplers  # one of the parts below
    python -m examples.benchmark.quantised --short           # tiny sizes: does it run?

    bytes     the residuals of GPT-2 small, codes and scales, to those of a bfloat16 model
    codecs    to quantise a weight, and to make it dense again
    step      a training step of GPT-2 small, r = 16, to that with dense residuals
    memory    the peak of such training, and what the state takes, each in a process of its own
    samplers  what quantising takes of a matrix with heavy tails, by the draw that comes before it
    draws     the same after each of ten resamples, with a master and by quantising again without

Random weights, AdamW. The contenders take turns in one process, in changing order, and of each the
fastest round counts.
"""

import argparse
import json
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from examples.benchmark.contenders import (
    TINY,
    Batch,
    Times,
    gpt2,
    interleave,
    rosa_of,
    timed,
    tokens,
    train_step,
)
from examples.benchmark.fresh_process import RETURNED, in_a_process
from examples.shared.machine import cpu
from examples.shared.peak_memory import peak_memory_of_this_process, reset_peak_memory
from rosa_func import samplers
from rosa_func.weight.quantised import QUANTISED

RANK, STEPS, DRAWS = 16, 3, 10
KINDS = (None, *QUANTISED)
MOST_BYTES, MOST_TIME = 0.30, 1.25  # of nf4: to bfloat16's, and to the dense step's


class Settings(NamedTuple):
    """The size of a run."""

    model: dict[str, int]  # of GPT2Config
    batch: Batch
    shape: tuple[int, int]
    rounds: int
    judged: bool


FULL = Settings({}, (4, 512), (3072, 768), rounds=7, judged=True)
SHORT = Settings(TINY.model, (2, 32), (128, 64), rounds=2, judged=False)


def judged(text: str, value: float, bar: float, s: Settings) -> str:
    """Say whether a value is at most a bar."""
    return f"{text}  at most {bar:g}: {'PASS' if value <= bar else 'FAIL'}" if s.judged else text


def started(s: Settings, kind: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return a skeleton of GPT-2, a state of it and a batch; the model is let go."""
    model = gpt2(s.model).to(dtype)
    state = rosa_func.init(model, RANK, quantize=kind, sampler=samplers.projection)
    return rosa_func.skeleton(model), state, tokens(model.config, s.batch)


def residual_bytes(state: TensorDict) -> int:
    """Count those of the adapted weights."""
    found = 0
    for name in state["input_dim"].keys():
        stored = state["frozen", name]
        parts = [stored] if isinstance(stored, Tensor) else stored.values()
        found += sum(part.nbytes for part in parts)
    return found


def bytes_(s: Settings) -> None:
    """Count bytes."""
    dense = residual_bytes(started(s, None, torch.bfloat16)[1])
    for kind in QUANTISED:
        ratio = residual_bytes(started(s, kind, torch.bfloat16)[1]) / dense
        text = f"bytes     {kind:11} {ratio:6.3f} of bfloat16's {dense / 1e6:,.1f} MB"
        print(judged(text, ratio, MOST_BYTES, s) if kind != "int8" else text, flush=True)


def codecs(s: Settings) -> None:
    """Time both ways."""
    for dtype in (torch.float32, torch.bfloat16):
        W = heavy_tailed(s.shape).to(dtype)
        wide, work = W.float(), {}
        for kind, base in QUANTISED.items():
            like = base.of(W, batch=False)
            work[f"{kind} store"] = partial(timed, partial(like.store, wide))
            work[f"{kind} dense"] = partial(timed, like.store(wide)[0].dense)
        times = interleave(work, 3 * s.rounds, 2, "codecs")
        for name in work:
            best = min(times[name]["seconds"])
            print(f"codecs    {name:17} {dtype!s:15} {1e3 * best:7.2f} ms", flush=True)


def step(s: Settings) -> None:
    """Time steps."""
    for dtype in (torch.float32, torch.bfloat16) if s.judged else (torch.float32,):
        work = {}
        for kind in KINDS:
            model, state, batch = started(s, kind, dtype)
            work[str(kind)] = partial(train_step, rosa_of(model, state), *batch)
        times: Times = interleave(work, s.rounds, 1, f"steps in {dtype}")
        for kind in QUANTISED:
            ratio = min(times[kind]["step"]) / min(times["None"]["step"])
            text = (
                f"step      {kind:11} {dtype!s:15} {min(times[kind]['step']):6.3f} s {ratio:6.3f}"
            )
            print(judged(text, ratio, MOST_TIME, s) if kind == "nf4" else text, flush=True)


def memory(s: Settings) -> None:
    """Measure the peak of training."""
    for kind in KINDS:
        arguments = json.dumps([s.judged, kind])
        found = in_a_process("examples.benchmark.quantised", "--work", arguments, **RETURNED)
        print(
            f"memory    {kind or 'dense':11} state {found['state']:6.0f} MiB, "
            f"peak of the process {found['peak']:6.0f} MiB",
            flush=True,
        )


def train(judged: bool, kind: str | None) -> dict[str, float]:
    """Take some steps in bfloat16; return MiB."""
    s = FULL if judged else SHORT
    model, state, batch = started(s._replace(batch=(1, s.batch[1] // 8)), kind, torch.bfloat16)
    contender = rosa_of(model, state)
    reset_peak_memory()
    for _ in range(STEPS):
        train_step(contender, *batch)
    held = sum(tensor.nbytes for tensor in state.values(True, True)) / 2**20
    return {"state": held, "peak": peak_memory_of_this_process()}


def heavy_tailed(shape: tuple[int, int]) -> Tensor:
    """Draw Student's t with three degrees of freedom, of about the size of a weight."""
    generator = torch.Generator().manual_seed(0)
    normal, *chi = (torch.randn(shape, generator=generator) for _ in range(4))
    return 0.02 * normal / torch.stack(chi).square().mean(0).sqrt()


def layer(s: Settings) -> nn.Linear:
    """Make a linear layer with such a weight, and a few directions that are larger, as in texts."""
    W = heavy_tailed(s.shape)
    U, values, V = torch.linalg.svd(W, full_matrices=False)
    values = values * (1 + 9 * torch.arange(1, len(values) + 1) ** -0.7)
    module = nn.Linear(*reversed(s.shape), bias=False)
    module.load_state_dict({"weight": (U * values) @ V})
    return module


def error(module: nn.Linear, state: TensorDict) -> float:
    """Return |what the state computes with - W| / |W|."""
    W = module.weight.detach()
    return float((rosa_func.merge(state)["weight"] - W).norm() / W.norm())


def of_samplers(s: Settings) -> None:
    """Compare starts."""
    module = layer(s)
    for kind in QUANTISED:
        for name in ("lora", "bottom", "projection", "random", "top"):
            sampler = getattr(samplers, name)
            state = rosa_func.init(module, RANK, sampler=sampler, quantize=kind)
            print(f"samplers  {kind:11} {name:11} {error(module, state):.4f}", flush=True)


def draws(s: Settings) -> None:
    """Compare resamples."""
    module = layer(s)
    for kind in QUANTISED:
        kept = rosa_func.init(module, RANK, quantize=kind, master=True)
        again = rosa_func.init(module, RANK, quantize=kind)
        first = error(module, kept)
        for key in range(DRAWS):
            kept = rosa_func.resample(kept, key)
            inside = nn.Linear(*reversed(s.shape), bias=False)
            inside.load_state_dict(rosa_func.merge(again))
            again = rosa_func.init(inside, RANK, quantize=kind, key=key + 1)
        ratio = error(module, kept) / first
        text = f"draws     {kind:11} after {DRAWS}: {error(module, again) / first:.2f} times one "
        text += f"quantisation's error {first:.4f}, with a master {ratio:.3f}"
        print(judged(text, ratio, 1.05, s), flush=True)


PARTS = {
    "bytes": bytes_,
    "codecs": codecs,
    "step": step,
    "memory": memory,
    "samplers": of_samplers,
    "draws": draws,
}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--short", action="store_true", help="tiny sizes")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(train(*json.loads(args.work))))
        return
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for part in args.parts:
        PARTS[part](SHORT if args.short else FULL)


if __name__ == "__main__":
    main()
