"""What `rosa_func.plan` says beside what a process is seen to need: a table.

    python -m examples.benchmark.planned [--short]

Each row is a fresh process: it makes the model, the state of rank 16, lets the model go, and takes
three steps of AdamW; its peak from the first step on is what is seen, less that of a process that
does all this with a tiny model. In these processes malloc gives each large tensor back when it is
freed (MALLOC_MMAP_THRESHOLD_): by itself glibc keeps some of that memory for later.
"""

import argparse
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rosa_func
from examples.benchmark.fresh_process import RETURNED, in_a_process
from examples.benchmark.sizes import SMOLLM2
from examples.shared.peak_memory import (
    give_back_freed_memory,
    peak_memory_of_this_process,
    reset_peak_memory,
)

RANK, STEPS = 16, 3
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 small": ("gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12}),
    "GPT-2 medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "GPT-2 large": ("gpt2", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "GPT-2 XL": ("gpt2", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
    "SmolLM2-135M": ("llama", SMOLLM2),
}
TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64}
BATCHES, TINY_BATCH = ((1, 64), (4, 256)), (2, 16)


def config(kind: str, sizes: dict[str, Any]) -> Any:
    """Return the config of a model, without dropout."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    return AutoConfig.for_model(kind, **sizes, **off, bos_token_id=0, eos_token_id=0)


def trained(kind: str, sizes: dict[str, Any], dtype: str, batch: list[int]) -> dict[str, float]:
    """Train some steps in this process; return the peak from the first of them on, in MiB."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config(kind, sizes), dtype=getattr(torch, dtype))
    state = rosa_func.init(model.train(), RANK, donate=True)
    described = rosa_func.skeleton(model)
    del model
    give_back_freed_memory()
    reset_peak_memory()
    ids = torch.zeros(*batch, dtype=torch.long)
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        rosa_func.call(described, state, ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return {"peak": peak_memory_of_this_process()}


def row(name: str, kind: str, sizes: dict[str, Any], dtype: str, batch: tuple[int, int]) -> str:
    """Return a line of the table."""
    module = "examples.benchmark.planned"
    jobs = [kind, sizes, dtype, batch], ["gpt2", TINY, dtype, TINY_BATCH]
    seen, beside = (
        in_a_process(module, "--work", json.dumps(job), **RETURNED)["peak"] for job in jobs
    )
    said = rosa_func.plan(config(kind, sizes), RANK, batch=batch, dtype=getattr(torch, dtype))
    peak = said.peak / 2**20
    return (
        f"{name:14} {dtype:9} {batch[0]} x {batch[1]:4}: plan {peak:8.0f} MiB, "
        f"seen {seen - beside:8.0f} MiB, {peak / (seen - beside):.3f}; "
        f"a resample {said.resample:.1f} s"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model alone")
    parser.add_argument(
        "--models", nargs="+", default=["GPT-2 small", "GPT-2 medium", "SmolLM2-135M"]
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(trained(*json.loads(args.work))))
        return
    if args.short:
        print(row("small", "gpt2", {"n_layer": 2, "n_embd": 256, "n_head": 4}, "float32", (4, 64)))
        return
    for name in args.models:
        kind, sizes = MODELS[name]
        for dtype in ("float32", "bfloat16"):
            for batch in BATCHES:
                print(row(name, kind, sizes, dtype, batch), flush=True)


if __name__ == "__main__":
    main()
