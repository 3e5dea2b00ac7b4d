"""Speed and memory of ROSA on GPT-2 small, beside full fine-tuning and `peft` LoRA.

    python -m examples.benchmark.speed            # about 20 minutes on 2 cores
    python -m examples.benchmark.speed --short    # a tiny model, under a minute: does it run?

The model is GPT-2 small by config, with random weights (speed does not depend on them), float32,
dropout 0 so that no random masks are timed, and AdamW without weight decay. All contenders of a
comparison take turns in one process: each round runs each of them once, in changing order, and
gives one ratio; the table has the median of the ratios and their quartiles. Peak memory comes
from a fresh process for each figure. At the higher ranks the larger batch is run with ROSA and
LoRA only. Writes benchmark.json (with every single time) and growth.png. The comparison with LoRA
needs `pip install "peft>=0.21"`.
"""

import argparse
import copy
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers

import rosa_func
from examples.benchmark.contenders import (
    CONTENDERS,
    FULL,
    TINY,
    Batch,
    Settings,
    gpt2,
    gpt2_config,
    interleave,
    peft,
    timed,
    tokens,
    train_step,
    trainable_values,
)
from examples.benchmark.growth import growth, plot
from examples.benchmark.memory import memory
from examples.benchmark.resample import resample
from examples.shared.machine import cpu
from examples.shared.options import positive

Target = tuple[str, float] | None
NAMES = {"full": "full FT", "peft": "peft LoRA", "rosa": "ROSA", "frozen": "frozen model"}
COMPARISONS: tuple[tuple[str, str, str, dict[int, Target]], ...] = (  # targets by rank
    (
        "step",
        "rosa",
        "peft",
        {16: ("at most", 1.02), 64: ("at most", 0.99), 256: ("at most", 0.99)},
    ),
    ("forward+backward", "rosa", "peft", {}),
    ("step", "full", "rosa", {16: ("at least", 1.45)}),
    ("forward+backward", "full", "rosa", {16: ("at least", 1.40)}),
    ("forward+backward", "rosa", "frozen", {16: ("at most", 1.08)}),
    ("step", "full", "frozen", {}),  # these two are the most that any adapter can gain
    ("forward+backward", "full", "frozen", {}),
)
PARTS = ("memory", "speed", "resample", "inference", "growth")
E2E_STEPS = -(-42_061 // 8)  # an epoch: its references, 8 a step


class Row(NamedTuple):
    """A line of the table: the medians of two figures, and the quartiles of their ratio."""

    what: str
    setting: str
    medians: str
    quartiles: list[float]
    target: Target


Part = tuple[list[Row], dict[str, Any]]


def compare(
    what: str,
    setting: str,
    over: list[float],
    under: list[float],
    target: Target = None,
    unit: str = "s",
) -> Row:
    """Take the ratio of each round, and the quartiles of the ratios."""
    ratios = torch.tensor(over, dtype=torch.float64) / torch.tensor(under, dtype=torch.float64)
    quartiles = ratios.quantile(ratios.new_tensor([0.25, 0.5, 0.75])).tolist()
    return Row(what, setting, f"{median(over):.4g} / {median(under):.4g} {unit}", quartiles, target)


def peak_memory(s: Settings) -> Part:
    """Compare the peak memory of three training steps."""
    peaks, setting = memory(s), f"r={s.ranks[0]}, {show(s.batches[0])}"
    rows = []
    for a, b, target in (("rosa", "peft", ("at most", 1.02)), ("full", "rosa", None)):
        if a in peaks and b in peaks:
            label = f"peak memory, {NAMES[a]} / {NAMES[b]}"
            pair = peaks[a]["peak"], peaks[b]["peak"]
            rows.append(compare(label, setting, *pair, target, "MB"))
    return rows, {f"memory in MB, {setting}": peaks}


def speed(s: Settings, rank: int) -> Part:
    """Time a training step at one rank."""
    base = gpt2(s.model)
    contenders = {name: make(copy.deepcopy(base), rank) for name, make in CONTENDERS.items()}
    values = {name: trainable_values(contender) for name, contender in contenders.items()}
    if peft and values["peft"] != values["rosa"]:
        raise RuntimeError(f"peft and ROSA would not train equally many values: {values}")
    rows, raw = [], {}
    for size in s.batches:
        # To save time, all of them at the first rank or batch only; else the two with a target.
        everyone = rank == s.ranks[0] or size == s.batches[0]
        names = [name for name in contenders if everyone or name in ("rosa", "peft")]
        if len(names) == 1:
            continue
        batch = tokens(base.config, size)
        work = {name: partial(train_step, contenders[name], *batch) for name in names}
        setting = f"r={rank}, {show(size)}"
        times = raw[f"speed, {setting}"] = interleave(work, s.rounds, s.warmup, setting)
        for what, a, b, targets in COMPARISONS:
            if a in times and b in times:
                label = f"{what}, {NAMES[a]} / {NAMES[b]}"
                pair = times[a][what], times[b][what]
                rows.append(compare(label, setting, *pair, targets.get(rank)))
    return rows, raw | {f"trainable values, r={rank}": values}


def resample_and_limits(s: Settings) -> Part:
    """Compare resamples of all weights with SVDs, with their limits and with an epoch of E2E."""
    times, rows = resample(s), []
    svd, epoch = times["svd"]["seconds"], [E2E_STEPS * one for one in times["step"]["step"]]
    for name, least, limit in (
        ("random", 6.0, "eigh and products"),
        ("projection", 50.0, "products"),
    ):
        seconds, setting = times[name]["seconds"], f"{name}, r={s.ranks[0]}"
        rows.append(compare("SVDs / resample", setting, svd, seconds, ("at least", least)))
        rows.append(compare(f"SVDs / its {limit} alone", setting, svd, times[limit]["seconds"]))
        label = f"resample / epoch of E2E ({E2E_STEPS:,} x 8x64)"
        rows.append(compare(label, setting, seconds, epoch))
    return rows, {f"resample, r={s.ranks[0]}": times}


def inference(s: Settings) -> Part:
    """Time a merged model: a stock module, with other numbers in it."""
    original = gpt2(s.model).eval()
    merged = copy.deepcopy(original)
    # lm_head.weight is tied to wte.weight, which the merge names.
    merged.load_state_dict(rosa_func.merge(rosa_func.init(original, s.ranks[0])), strict=False)
    rows, raw = [], {}
    for size in s.batches:
        ids, _ = tokens(original.config, size)
        work = {
            "merged": partial(timed, partial(merged, ids, use_cache=False)),
            "original": partial(timed, partial(original, ids, use_cache=False)),
        }
        label = f"inference, {show(size)}"
        with torch.no_grad():
            times = raw[label] = interleave(work, s.rounds, s.warmup, label)
        pair = times["merged"]["seconds"], times["original"]["seconds"]
        rows.append(compare("inference, merged / original, both stock", show(size), *pair))
    return rows, raw


def growth_and_plot(s: Settings, out: Path) -> Part:
    """Time steps and resamples of other sizes; the table has the share of the largest ones."""
    times = growth(s)
    plot(times, s, out / "growth.png")
    rows = [
        compare(
            "growth: resample / step",
            f"{axis} {place}",
            times[axis]["resample"][str(place)],
            times[axis]["step"][str(place)],
        )
        for axis, places in (("width", s.widths), ("rank", s.growth_ranks))
        for place in (min(places), max(places))
    ]
    return rows, {"growth": times}


def line(row: Row, judged: bool) -> str:
    """Format a line of the table."""
    low, middle, high = row.quartiles
    figures = f"{row.medians:>22}  {middle:>9.4g} [{low:.4g}, {high:.4g}]"
    if row.target is None:
        return f"{row.what:44} {row.setting:18} {figures}"
    bound, limit = row.target
    met = middle <= limit if bound == "at most" else middle >= limit
    verdict = ("PASS" if met else "FAIL") if judged else "not judged"
    return f"{row.what:44} {row.setting:18} {figures:58} {bound} {limit:g}: {verdict}"


def environment() -> dict[str, Any]:
    """Describe the machine and the versions."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__ if peft else None,
        "rosa_func": rosa_func.__version__,
    }


def training(s: Settings) -> dict[str, Any]:
    """Describe the model, and what all contenders have in common."""
    model = gpt2_config(s.model)
    names = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    return {
        "model": {name: getattr(model, name) for name in names},
        "contenders": "float32, dropout 0, AdamW(lr=1e-6, weight_decay=0), random weights and ids",
    }


def save(report: dict[str, Any], path: Path) -> None:
    """Write to another file first, so that an interrupt leaves the last whole one."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(path)


def show(size: Batch) -> str:
    """Write a batch as 4x128."""
    return f"{size[0]}x{size[1]}"


def batch(text: str) -> Batch:
    """Read a batch written as 4x128."""
    try:
        sequences, length = map(int, text.split("x"))
    except ValueError:
        sequences = length = 0
    if sequences < 1 or not 2 <= length <= 1024:
        raise argparse.ArgumentTypeError(
            f"a batch is sequences x tokens (2 to 1024), such as 4x128; got {text!r}"
        )
    return sequences, length


def main() -> None:
    """Run every part, print its lines, and save what is there after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="a directory")
    parser.add_argument("--rounds", type=positive, help=f"default {FULL.rounds}")
    parser.add_argument("--batch", type=batch, nargs="+", help="default 4x128 2x512")
    parser.add_argument("--rank", type=positive, nargs="+", help="default 16 64 256")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default all")
    parser.add_argument("--short", action="store_true", help="a tiny model and few rounds")
    args = parser.parse_args()
    s = TINY if args.short else FULL
    s = s._replace(rounds=args.rounds or s.rounds, batches=tuple(args.batch or s.batches))
    s = s._replace(ranks=tuple(args.rank or s.ranks))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "benchmark.json"
    judged = not s.short and set(s.batches) <= set(FULL.batches)
    report: dict[str, Any] = {"environment": environment(), "config": s._asdict() | training(s)}
    report |= {"rows": [], "raw": {}}
    works: dict[str, list[Callable[[], Part]]] = {
        "memory": [partial(peak_memory, s)],
        "speed": [partial(speed, s, rank) for rank in s.ranks],
        "resample": [partial(resample_and_limits, s)],
        "inference": [partial(inference, s)],
        "growth": [partial(growth_and_plot, s, args.out)],
    }
    if peft is None:
        print('peft is not installed, so nothing is compared with it: pip install "peft>=0.21"')
    if not judged:
        print("not judged: the targets are for GPT-2 small at the batches 4x128 and 2x512")
    print(f"{'figure':44} {'setting':18} {'medians':>22}  ratio: median [quartiles]        target")
    try:
        for work in [work for part in works if part in args.parts for work in works[part]]:
            rows, raw = work()
            report["rows"] += [row._asdict() for row in rows]
            report["raw"] |= raw
            save(report, path)
            print(*(line(row, judged) for row in rows), sep="\n", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; {path} has the parts that are printed above")
        raise SystemExit(130) from None
    print(f"every single time: {path}")
    if "growth" in args.parts:
        print(f"growth with width and rank: {args.out / 'growth.png'}")


if __name__ == "__main__":
    main()
