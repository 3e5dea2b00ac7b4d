"""What `rosa_func.plan` says: beside what a process is seen to need, and of models too large here.

    python -m examples.benchmark.planned [--short] [--parts seen llama]

1. Seen: each row is a fresh process. It makes the model, the state of rank 16, lets the model go,
   and takes three steps of AdamW; its peak from the first step on is what is seen, less that of a
   process that does all this with a tiny model. In these processes malloc gives each large tensor
   back when it is freed (MALLOC_MMAP_THRESHOLD_): by itself glibc keeps some of that memory.
2. Llama: the table of examples/guide/plan.md, of models of 8 and 70 billion parameters on 1, 2 and
   8 devices, with gradient checkpointing. Nothing of that size is made. It needs torch 2.13.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
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

PARTS = ("seen", "llama")
UNITS = {"MiB": 2**20, "GiB": 2**30}
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
SHORT = "small", "gpt2", {"n_layer": 2, "n_embd": 256, "n_head": 4}, "float32", (4, 64)

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
LLAMAS: dict[str, dict[str, Any]] = {
    "8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
TINY_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
STORED: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "nf4, master": {"quantize": "nf4", "master": True},
    "nf4": {"quantize": "nf4"},
}
HEAD = """\
In {unit}, and minutes for a resample:

| model | frozen part | devices | frozen | compensation | gathered | what trains | activations | \
peak | received a step | resample |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


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


def checkpointed(kind: str, sizes: dict[str, Any]) -> torch.nn.Module:
    """Return a model on the meta device whose layers are computed again in backward."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(kind, sizes))
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options = {"use_reentrant": False, "context_fn": rosa_func.recompute}
    getattr(model, f"{switch}_checkpointing_enable")(options)
    return model


def planned(name: str, sizes: dict[str, Any], batch: tuple[int, int], unit: int) -> Iterator[str]:
    """Yield the lines of the table of one model."""
    for stored, options in STORED.items():
        model, dtype = checkpointed("llama", sizes), torch.bfloat16
        whole = rosa_func.plan(model, RANK, batch=batch, dtype=dtype, **options)
        for ranks in (1, 2, 8):  # a step is the same on each
            held = rosa_func.plan(model, RANK, dtype=dtype, ranks=ranks, **options)
            trains = whole.trainable + whole.gradients + whole.moments
            kinds = held.frozen, held.compensation, held.gathered, trains, whole.activations
            cells = [f"{size / unit:.2f}" for size in (*kinds, sum(kinds), held.traffic)]
            minutes = whole.resample / ranks / 60
            yield f"| {name} | {stored} | {ranks} | {' | '.join(cells)} | {minutes:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="tiny models alone")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--models", nargs="+", default=["GPT-2 small", "GPT-2 medium", "SmolLM2-135M"]
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(trained(*json.loads(args.work))))
        return
    every = product(args.models, ("float32", "bfloat16"), BATCHES)
    rows = [(name, *MODELS[name], dtype, batch) for name, dtype, batch in every]
    for each in ([SHORT] if args.short else rows) if "seen" in args.parts else ():
        print(row(*each), flush=True)
    if "llama" in args.parts:
        models, tokens, unit = (
            ({"tiny": TINY_LLAMA}, 16, "MiB") if args.short else (LLAMAS, 2048, "GiB")
        )
        print(HEAD.format(unit=unit))
        for name, sizes in models.items():
            for line in planned(name, sizes, (1, tokens), UNITS[unit]):
                print(line, flush=True)


if __name__ == "__main__":
    main()
