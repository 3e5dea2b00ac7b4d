"""The command line, and the names of the files that a run writes."""

import argparse
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from examples.shared.options import (
    at_least,
    density,
    folder,
    not_negative,
    positive,
    positive_number,
)

RATES = {"full": 1e-4, "lora": 1e-3, "rosa": 1e-3, "robust": 7e-4}
EVERY = {"full": 0, "lora": 0, "rosa": 100, "robust": 0}
SAMPLERS = ["random", "top", "bottom", "projection", "lora", "additive"]
NO_MATTER = ("out", "resume", "save_every")  # to the result


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m examples.finetune",
        description="Fine-tune a causal language model on E2E or ELI5: full, LoRA, ROSA or robust.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # These have no default that could be shown: their help says what is done without them.
    absent = argparse.Namespace(data=None, rate=None, resample_every=None)
    rates = ", ".join(f"{method} {rate:g}" for method, rate in RATES.items())
    data = "folder with train, dev and test.jsonl (default: the task's data from the Hub)"
    rate = f"peak learning rate (default: by method, {rates})"
    cycles = f"steps; 0 for never (default: rosa {EVERY['rosa']}, robust {EVERY['robust']})"
    after = "steps of the factors alone in robust"
    restart = "from the pretrained weights after these steps; the schedule goes on"
    add("--task", choices=["e2e", "eli5"], default="e2e", help="what to learn")
    add("--data", type=folder, default=argparse.SUPPRESS, help=data)
    add("--model", default="gpt2", help="a Hub name, a directory, or smollm2")
    add("--method", choices=[*RATES], default="rosa", help="how to train")
    add("--sampler", choices=SAMPLERS, default="random", help="of rosa and robust")
    add("--rank", type=not_negative, default=16, help="of the factors; not of full; 0 in robust")
    add("--resample-every", type=not_negative, default=argparse.SUPPRESS, help=cycles)
    add("--density", type=density, default=0.006, help="of the sparse part of robust")
    add("--sparse-after", type=not_negative, default=64, help=after)
    add("--sparse-rate", type=positive_number, default=2e-4, help="peak, of the sparse part")
    add("--score-batches", type=positive, default=4, help="to choose the support by")
    add("--restart", action=argparse.BooleanOptionalAction, default=True, help=restart)
    add("--rate", type=positive_number, default=argparse.SUPPRESS, help=rate)
    add("--warmup", type=not_negative, default=20, help="steps")
    add("--steps", type=not_negative, default=300, help="0 to evaluate the model as it is")
    add("--batch", type=positive, default=4, help="sequences")
    # One token of the prompt and one of the reference are the least that has a loss.
    add("--max-length", type=at_least(2), default=256, help="tokens")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    add("--eval-every", type=positive, default=100, help="steps")
    add("--dev", type=not_negative, default=128, help="dev references; 0 for all")
    add("--test", type=not_negative, default=512, help="test references; 0 for all")
    moments = "of AdamW, at a resample"
    add("--moments", choices=["reset", "project", "keep"], default="reset", help=moments)
    add("--save-every", type=not_negative, default=0, help="steps; 0 for no checkpoint")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--seed", type=int, default=0, help="of the factors, the order and dropout")
    add("--out", type=folder, default="runs/finetune", help="folder for log and checkpoint")
    args = parser.parse_args(namespace=absent)
    if not args.rank and args.method != "robust":
        parser.error("argument --rank: 0 leaves nothing to train but the sparse part of robust")
    if not args.rank and args.sparse_after:
        parser.error("argument --sparse-after: with --rank 0 nothing trains before: pass 0")
    if args.method == "robust" and 0 < args.steps <= args.sparse_after:
        parser.error(
            f"argument --sparse-after: {args.sparse_after} leaves none of {args.steps} steps"
        )
    if args.resample_every is None:
        args.resample_every = EVERY[args.method]
    if args.data is not None:
        args.data = args.data.resolve()  # so that a run can be resumed from another directory
    return args


def label(args: argparse.Namespace) -> str:
    """Return the method's name, with its sampler if it has one."""
    has_sampler = args.method in ("rosa", "robust")
    return f"{args.method}-{args.sampler}" if has_sampler else args.method


def files(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the paths of the log and of the checkpoint."""
    rank = "" if args.method == "full" else f"-r{args.rank}"
    rank += f"-d{args.density:g}" if args.method == "robust" else ""
    stem = f"{args.task}-{Path(args.model).name}-{label(args)}{rank}-s{args.seed}"
    return args.out / f"{stem}.jsonl", args.out / f"{stem}.safetensors"


def deciding(args: argparse.Namespace) -> dict[str, str]:
    """Return the options that decide the result."""
    return {name: str(value) for name, value in vars(args).items() if name not in NO_MATTER}


def logged(path: Path) -> dict[str, Any]:
    """Return the options that a log begins with; none if there is no log, or only half a line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return json.loads(lines[0]) if lines and lines[0].endswith("\n") else {}


def refuse_other(path: Path, then: dict[str, Any], args: argparse.Namespace) -> None:
    """End here if the file is of a run with other options."""
    now = deciding(args)
    other = [f"{name}={then.get(name)}" for name in now if str(then.get(name)) != now[name]]
    if then and other:
        sys.exit(
            f"{path} is of a run with {', '.join(other)}: resume with the same options, "
            "or choose another --out"
        )


def set_aside(*paths: Path) -> None:
    """Rename what an earlier run has left there: all to the first number that is free."""
    for number in count(1):
        aside = [path.with_name(f"{path.name}.{number}") for path in paths]
        if not any(path.exists() for path in aside):
            break
    for path, new in zip(paths, aside, strict=True):
        if path.exists():
            path.rename(new)
            print(f"an earlier run's {path} is now {new.name}")
