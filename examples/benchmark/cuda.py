"""Speed and memory of ROSA on a GPU, beside `peft` LoRA, full fine-tuning and the frozen model.

    python -m examples.benchmark.cuda --out runs/cuda        # about 8 minutes on one GPU
    python -m examples.benchmark.cuda --device cpu --short   # tiny models: does it run?

It has not been run on a GPU yet. The setting is that of Table 1 of the ROSA paper: 8 x 512 tokens,
r = 16, dropout 0, AdamW without weight decay; its model is GPT-2 small in float32. Weights and ids
are random, on which speed does not depend. All contenders of a part take turns in one process,
three steps at a time, and wait for the device after those alone; the fastest of the rounds counts.
The memory is the most that was allocated while a contender trained alone.

Figures go to results.jsonl in the folder when a part has ended, and table.md is written again, so a
run that is stopped leaves what it has. Parts for which --limit leaves no time are named. The
comparison with LoRA needs `pip install "peft>=0.21"`.
"""

import argparse
import copy
import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

import rosa_func
from examples.benchmark.contenders import Contender, interleave, peft, trainable_values
from examples.benchmark.on_device import CONTENDERS, Run, built, loss_of, steps, tokens
from examples.shared.machine import cpu
from examples.shared.options import positive, positive_number
from examples.shared.peak_memory import peak_memory_of_this_process, reset_peak_memory

Record = dict[str, Any]

# What matters most comes first, for a run whose time is short; to compile takes longest.
PARTS = (
    "gpt2-small,bfloat16,eager",
    "gpt2-small,bfloat16,resample",
    "gpt2-small,float32,eager",
    "gpt2-small,float32,resample",
    "llama-1b,bfloat16,eager",
    "gpt2-medium,bfloat16,eager",
    "gpt2-small,bfloat16,compiled",
    "llama-1b,bfloat16,compiled",
    "gpt2-medium,bfloat16,compiled",
)
NAMES = {"rosa": "ROSA", "peft": "peft LoRA", "full": "full fine-tuning", "frozen": "frozen model"}
# (figure, over, under, sign, bar)
BARS = (
    ("step", "rosa", "peft", "<=", 0.95),
    ("step", "full", "rosa", ">=", 1.9),
    ("forward+backward", "rosa", "frozen", "<=", 1.08),
    ("memory", "rosa", "peft", "<=", 1.0),
    ("memory", "full", "rosa", "", None),
)
RESAMPLE_BARS = {"random": 1.0, "projection": 0.1}  # seconds, of GPT-2 small


def freed(run: Run) -> None:
    """Give what is not used any more back, compiled code too."""
    torch.compiler.reset()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def peak(make: Callable[..., Contender], name: str, dtype: str, run: Run) -> float:
    """Return the most MB that were allocated while a contender trained alone."""
    model = built(name, dtype, run)
    ids, labels = tokens(model, run)
    contender = make(model, name, run.rank)
    del model
    gc.collect()
    is_cuda = run.device.type == "cuda"
    (torch.cuda.reset_peak_memory_stats if is_cuda else reset_peak_memory)()
    steps(contender, loss_of(contender, "eager", run), ids, labels, run)
    return torch.cuda.max_memory_allocated() / 2**20 if is_cuda else peak_memory_of_this_process()


def training(name: str, dtype: str, mode: str, run: Run) -> dict[str, dict[str, float]]:
    """Return {figure: {contender: value}} of training one model."""
    found: dict[str, dict[str, float]] = {}
    if mode == "eager":  # a compiler has its own ways with memory, and takes long
        for who, make in CONTENDERS.items():
            found.setdefault("memory", {})[who] = peak(make, name, dtype, run)
            freed(run)
    base = built(name, dtype, run)
    ids, labels = tokens(base, run)
    contenders = {
        who: make(copy.deepcopy(base), name, run.rank) for who, make in CONTENDERS.items()
    }
    values = {who: trainable_values(contender) for who, contender in contenders.items()}
    if values.get("peft", values["rosa"]) != values["rosa"]:
        raise RuntimeError(f"peft and ROSA would not train equally many values: {values}")
    del base
    works = {
        who: partial(steps, contender, loss_of(contender, mode, run), ids, labels, run)
        for who, contender in contenders.items()
    }
    times = interleave(works, run.rounds, 2, f"{name}, {dtype}, {mode}")
    for what in ("step", "forward+backward"):
        found[what] = {who: min(each[what]) for who, each in times.items()}
    return found


def resampling(name: str, dtype: str, run: Run) -> dict[str, dict[str, float]]:
    """Return {figure: {sampler: seconds}} of a resample."""
    state = rosa_func.init(built(name, dtype, run), run.rank, donate=True)

    def once(sampler: rosa_func.samplers.Sampler) -> float:
        run.wait()
        start = perf_counter()
        rosa_func.resample(state, 1, sampler=sampler)
        run.wait()
        return perf_counter() - start

    found = {}
    for sampler in (rosa_func.samplers.projection, rosa_func.samplers.random):
        once(sampler)  # libraries are loaded at the first one
        found[sampler.__name__] = min(once(sampler) for _ in range(3))
    return {"resample": found}


def rows(records: list[Record], judged: bool) -> list[str]:
    """Return the lines of the table."""
    lines = ["| figure | setting | values | ratio | bar | |", "|---|---|---|---|---|---|"]

    def add(what: str, setting: str, values: str, number: float, sign: str, bar: Any) -> None:
        is_met = bar is not None and (number <= bar if sign == "<=" else number >= bar)
        target = "" if bar is None else f"{sign} {bar:g}"
        said = "" if bar is None else "not judged" if not judged else "met" if is_met else "missed"
        lines.append(f"| {what} | {setting} | {values} | {number:.3g} | {target} | {said} |")

    for record in records:
        figures, setting = record["figures"], record["part"].replace(",", ", ")
        for sampler, seconds in figures.get("resample", {}).items():
            bar = RESAMPLE_BARS[sampler]
            add(f"a resample, `{sampler}`", setting, f"{seconds:.3g} s", seconds, "<=", bar)
        for what, over, under, sign, bar in BARS:
            values = figures.get(what, {})
            if over in values and under in values:
                unit, scale = ("MB", 1) if what == "memory" else ("ms", 1e3)
                a, b = values[over] * scale, values[under] * scale
                label = f"{what}, {NAMES[over]} / {NAMES[under]}"
                add(label, setting, f"{a:.4g} / {b:.4g} {unit}", a / b, sign, bar)
    return lines


def environment(run: Run) -> Record:
    """Describe the machine, the versions and the setting."""
    is_cuda = run.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else cpu(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "peft": peft.__version__ if peft else None,
        "rosa_func": rosa_func.__version__,
        "rank": run.rank,
        "batch": "x".join(map(str, run.batch)),
        "rounds": run.rounds,
    }


def main() -> None:
    """Run each part, write its figures, and the table with all so far."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="such as cuda:1, or cpu")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default all")
    parser.add_argument("--rank", type=positive, default=16, help="default 16")
    parser.add_argument("--rounds", type=positive, default=9, help="default 9")
    parser.add_argument("--limit", type=positive_number, help="seconds after which no part begins")
    parser.add_argument("--out", type=Path, default=Path("runs/cuda"), help="a folder")
    parser.add_argument("--short", action="store_true", help="tiny models and batches")
    args = parser.parse_args()
    batch = (2, 32) if args.short else (8, 512)
    run = Run(torch.device(args.device), args.rank, batch, args.rounds, args.short)
    if run.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here: --device cpu --short tries the benchmark")
    args.out.mkdir(parents=True, exist_ok=True)
    if run.device.index is not None:
        torch.cuda.set_device(run.device)
    described, start, records, left_out = environment(run), perf_counter(), [], []
    (args.out / "results.jsonl").write_text(json.dumps(described) + "\n")
    judged = run.device.type == "cuda" and not run.short
    for part in args.parts:
        if args.limit is not None and perf_counter() - start > args.limit:
            left_out.append(part)
            continue
        name, dtype, mode = part.split(",")
        record: Record = {"part": part, "figures": {}}
        try:
            if mode == "resample":
                record["figures"] = resampling(name, dtype, run)
            else:
                record["figures"] = training(name, dtype, mode, run)
        except Exception as error:  # the time on a GPU is short: the other parts go on
            record["error"] = f"{type(error).__name__}: {error}"
        freed(run)
        record["seconds since the start"] = seconds = perf_counter() - start
        records.append(record)
        with (args.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        head = [f"{key}: {value}" for key, value in described.items()]
        text = "\n".join(["; ".join(head), "", *rows(records, judged), ""])
        (args.out / "table.md").write_text(text)
        print(f"{part}: {record.get('error', 'done')} after {seconds:.0f} s", flush=True)
    failed = [record for record in records if "error" in record]
    with (args.out / "table.md").open("a") as file:
        file.writelines(f"\n{each['part']} failed: {each['error']}\n" for each in failed)
        if left_out:
            file.write(f"\nleft out, since --limit was over: {'; '.join(left_out)}\n")
    print((args.out / "table.md").read_text())
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
