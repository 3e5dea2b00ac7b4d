"""What a state costs on disk and in memory: a table, each figure of memory in a fresh process.

    python -m examples.benchmark.sizes [--short] [--parts disk loading checkpointing training]

1. Disk: the whole state of GPT-2 small against the change alone, after five cycles at rank 8.
2. Loading: `init_from` on a model of SmolLM2-135M's size, its peak above the state that it returns.
3. Gradient checkpointing: peak memory and time of training GPT-2 small, with and without.
4. Training from a folder: `init_from` and three steps of GPT-2 medium on 1 x 64 tokens, beside
   `from_pretrained` and peft's LoRA, in bfloat16 and float32. In all of these processes what is
   freed goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that a peak is what was used.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rosa_func
from examples.benchmark.contenders import (
    Contender,
    gpt2,
    peft,
    peft_lora,
    rosa,
    rosa_of,
    tokens,
    train_step,
)
from examples.benchmark.fresh_process import RETURNED, in_a_process
from examples.shared.peak_memory import memory_of_this_process, peak_memory_of_this_process
from rosa_func import checkpoint, samplers

PARTS = ("disk", "loading", "checkpointing", "training")
RANK, CYCLES, STEPS = 8, 5, 2
TRAINING_RANK = 16
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
GPT2_MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
TINY_GPT2 = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512}
TINY_LLAMA = SMOLLM2 | {"vocab_size": 512, "num_hidden_layers": 2}


def moved(state: TensorDict, seed: int) -> TensorDict:
    """Return the state with factors a tenth away, as after a cycle of training."""
    generator = torch.Generator().manual_seed(seed)

    def move(leaf: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(leaf.shape, generator=generator)
        return leaf + 0.1 * leaf.norm() / noise.norm() * noise

    return state.replace(trainable=state["trainable"].apply(move))


def disk(sizes: dict[str, int]) -> list[str]:
    """Compare the files of a state and of its change."""
    model = gpt2(sizes)
    state = moved(rosa_func.init(model, RANK), 0)
    for cycle in range(1, CYCLES):
        state = moved(rosa_func.resample(state, cycle), cycle)
    change = checkpoint.delta(state, model)
    weights, merged = checkpoint.apply_delta(model, change), rosa_func.merge(state)
    error = max(
        float((weights[name] - merged[name]).norm() / merged[name].norm().clamp_min(1e-30))
        for name in merged
    )
    ranks = [factors["A"].shape[1] for factors in change["change"].values()]
    with tempfile.TemporaryDirectory() as folder:
        whole, alone = Path(folder, "state"), Path(folder, "change")
        checkpoint.save(whole, state)
        checkpoint.save(alone, change)
        large, small = (path.stat().st_size / 1e6 for path in (whole, alone))
    return [
        f"disk: the whole state {large:.1f} MB, the change after {CYCLES} cycles {small:.1f} MB "
        f"({small / large:.1%}), ranks {min(ranks)} to {max(ranks)}, relative error {error:.1e}"
    ]


def loading(config: dict[str, int]) -> list[str]:
    """Measure the peak of `init_from` above its result."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
        result = apart("load", folder)
    return [
        f"init_from: state {result['state']:.0f} MiB, peak above it {result['above']:.0f} MiB "
        f"(limit 64), {result['seconds']:.1f} s"
    ]


def checkpointing(sizes: dict[str, int], batch: tuple[int, int]) -> list[str]:
    """Compare training with and without gradient checkpointing."""
    plain, again = (apart("train", sizes, batch, used) for used in (False, True))
    return [
        f"gradient checkpointing, {batch[0]} x {batch[1]} tokens: peak above the start "
        f"{again['above']:.0f} instead of {plain['above']:.0f} MiB, "
        f"{again['seconds'] / plain['seconds']:.2f} times the time"
    ]


def training(sizes: dict[str, int]) -> list[str]:
    """Compare the memory of training from a folder with peft's."""
    lines = []
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            gpt2(sizes).to(getattr(torch, dtype)).save_pretrained(folder)
            found = {method: apart("finetune", method, folder, **RETURNED) for method in METHODS}
        for method, of in found.items():
            line = (
                f"{dtype}, {NAMES[method]}: peak {of['peak']:.0f} MiB, then {of['held']:.0f}, "
                f"of which compensation {of['compensation']:.0f}"
            )
            if "peft" in found and method != "peft":
                ratio = (of["peak"] - of["compensation"]) / found["peft"]["peak"]
                line += f"; without that {ratio:.3f} of peft's peak"
            lines.append(line)
    return lines


def apart(what: str, *args: Any, **variables: str) -> dict[str, float]:
    """Run `load`, `train` or `finetune` in a fresh process."""
    return in_a_process(
        "examples.benchmark.sizes", "--work", json.dumps([what, *args]), **variables
    )


def load(folder: str) -> dict[str, float]:
    """Do `init_from`; return sizes in MiB."""
    torch.linalg.eigh(torch.eye(64))  # what LAPACK needs once is not the loading's
    before, start = peak_memory_of_this_process(), time.perf_counter()
    _, state = rosa_func.init_from(folder, RANK)
    seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in state.values(True, True)) / 2**20
    return {"state": held, "above": peak_memory_of_this_process() - before - held} | {
        "seconds": seconds
    }


def train(sizes: dict[str, int], batch: list[int], checkpointed: bool) -> dict[str, float]:
    """Take some steps; return the peak above that before them, in MiB, and the time of the last."""
    model = gpt2(sizes).train()
    if checkpointed:
        options = {"use_reentrant": False, "context_fn": rosa_func.recompute}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:  # transformers before 5.23
            model.gradient_checkpointing_enable(options)
    contender = rosa(model, RANK)
    inputs = tokens(model.config, tuple(batch))
    del model
    before = peak_memory_of_this_process()
    times = [train_step(contender, *inputs)["step"] for _ in range(STEPS)]
    return {"above": peak_memory_of_this_process() - before, "seconds": times[-1]}


NAMES = {"peft": "peft LoRA", "random": "ROSA", "folder": "the same in a folder", "lora": "LoRA"}
METHODS = [method for method in NAMES if peft or method != "peft"]


def finetune(method: str, folder: str) -> dict[str, float]:
    """Load a model from its folder and take some steps; return sizes in MiB."""
    kept = 0
    with tempfile.TemporaryDirectory() as place:
        if method == "peft":
            model = GPT2LMHeadModel.from_pretrained(folder, dtype="auto")
            contender, config = peft_lora(model.train(), TRAINING_RANK), model.config
            del model
        else:
            contender, config, kept = of_ours(method, folder, place)
        inputs = tokens(config, (1, 64))
        for _ in range(3):
            train_step(contender, *inputs)
        peak, held = peak_memory_of_this_process(), memory_of_this_process()
    return {"peak": peak, "held": held, "compensation": kept / 2**20}


def of_ours(method: str, folder: str, place: str) -> tuple[Contender, Any, int]:
    """Return what trains, its config, and the bytes of compensation that are in memory."""
    model, state = rosa_func.init_from(
        folder,
        TRAINING_RANK,
        sampler=samplers.lora if method == "lora" else samplers.random,
        compensation=place if method == "folder" else None,
    )
    lost = state.get("compensation", {}).values() if method != "folder" else ()
    return rosa_of(model.train(), state), model.config, sum(tensor.nbytes for tensor in lost)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="tiny models")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default all")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        what, *rest = json.loads(args.work)
        print(json.dumps({"load": load, "train": train, "finetune": finetune}[what](*rest)))
        return
    small = TINY_GPT2 if args.short else {}
    works = {
        "disk": partial(disk, small),
        "loading": partial(loading, TINY_LLAMA if args.short else SMOLLM2),
        "checkpointing": partial(checkpointing, small, (2, 32) if args.short else (8, 512)),
        "training": partial(training, small or GPT2_MEDIUM),
    }
    for part in PARTS:
        if part in args.parts:
            print(*works[part](), sep="\n", flush=True)


if __name__ == "__main__":
    main()
