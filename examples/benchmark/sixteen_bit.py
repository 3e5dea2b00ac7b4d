"""What a resample takes in 16 bits beside float32.

    python -m examples.benchmark.sixteen_bit            # a minute of one core
    python -m examples.benchmark.sixteen_bit --short    # small matrices: does it run?

The weights have the shapes of a block of GPT-2 medium. A 16-bit residual is stored with the next
eight bits of the float32 that was rounded, so a resample puts the two together and takes them
apart. The dtypes take turns on one thread; of each the least processor time counts.
"""

import argparse
from functools import partial

import torch
from tensordict import TensorDict
from torch import nn

import rosa_func
from examples.benchmark.contenders import clocked, interleave
from examples.shared.machine import cpu
from rosa_func import samplers

RANK, ROUNDS = 16, 9
SAMPLERS = {"random": samplers.random, "projection": samplers.projection}
LIMITS = {"random": 1.25, "projection": 2.0}  # of the time in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def block(width: int, dtype: torch.dtype) -> TensorDict:
    """Return a state of the weights of a block of GPT-2."""
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    layers = [nn.Linear(n, m, bias=False, dtype=dtype) for m, n in shapes]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, 0.02, generator=generator)
    return rosa_func.init(nn.Sequential(*layers), RANK, sampler=samplers.projection)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="small matrices")
    args = parser.parse_args()
    torch.set_num_threads(1)
    states = {name: block(64 if args.short else 1024, dtype) for name, dtype in DTYPES.items()}
    print(f"resample of a block, r={RANK}, processor time, {cpu()}, torch {torch.__version__}")
    for how, sampler in SAMPLERS.items():
        resample = partial(rosa_func.resample, key=1, sampler=sampler)
        work = {name: partial(clocked, partial(resample, state)) for name, state in states.items()}
        times = interleave(work, ROUNDS, 1, how)
        least = {name: min(of["processor"]) for name, of in times.items()}
        for name, seconds in least.items():
            ratio = seconds / least["float32"]
            limit = f" of float32's, at most {LIMITS[how]}" if name == "bfloat16" else ""
            print(f"{how:10} {name:8} {seconds * 1e3:8.1f} ms  {ratio:.2f}{limit}", flush=True)


if __name__ == "__main__":
    main()
