"""Time and memory of training the experts of a Mixtral, beside peft's `target_parameters`.

    python -m examples.benchmark.experts             # several minutes on 2 cores
    python -m examples.benchmark.experts --short     # a tiny model: does it run?

The model is a wide Mixtral of two layers by config, with random weights, float32. Its experts are
3-D parameters (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), and transformers computes them
by one of several implementations, each of which is run: `eager` (a loop over the experts),
`grouped_mm` (tokens sorted by expert, one grouped product) and `batched_mm` (a copy of the weights
for each token and expert, so it gets fewer tokens). Both contenders adapt the linear layers of the
attention and the experts at one rank, with equally many trainable values, and train with AdamW:

    rosa    rosa_func.init with its default targets
    peft    LoraConfig with target_modules and target_parameters

They take turns in one process, in changing order; of each the fastest step counts, since whatever
else the machine does only ever adds to a time. Peak memory is that of three steps in a fresh
process, counted from when the contender has been made, as a whole and above what the process held
before there was a model (the libraries). Needs `pip install "peft>=0.21"`.
"""

import argparse
import copy
import gc
import json
import os
import warnings
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import rosa_func
from examples.benchmark.contenders import (
    Contender,
    Times,
    adamw,
    clocked,
    interleave,
    peft,
    rosa_of,
    tokens,
    train_step,
    trainable_values,
)
from examples.benchmark.fresh_process import in_a_process
from examples.shared.machine import cpu
from examples.shared.options import positive
from examples.shared.peak_memory import peak_memory_of_this_process, reset_peak_memory

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BAR = 0.8  # of each ratio, ours to peft's


class Settings(NamedTuple):
    """The size of a run."""

    width: int
    intermediate: int
    vocabulary: int
    rank: int
    tokens: int  # in one sequence
    copied_tokens: int  # the same for batched_mm, which copies the weights for each
    rounds: int
    warmup: int  # rounds that do not count
    repeats: int  # processes for each figure of memory


class Job(NamedTuple):
    """What one process measures."""

    name: str  # of the contender
    implementation: str
    width: int
    intermediate: int
    vocabulary: int
    rank: int
    tokens: int
    attention_only: bool


FULL = Settings(
    512, 1024, 512, rank=8, tokens=1024, copied_tokens=32, rounds=9, warmup=2, repeats=3
)
TINY = Settings(32, 64, 64, rank=2, tokens=32, copied_tokens=16, rounds=3, warmup=1, repeats=1)


def mixtral(job: Job) -> MixtralForCausalLM:
    """Build a Mixtral with random weights; the global random state is put back."""
    config = MixtralConfig(
        hidden_size=job.width,
        intermediate_size=job.intermediate,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=job.vocabulary,
        max_position_embeddings=4096,
        experts_implementation=job.implementation,
        # The ids of special tokens lie outside a small vocabulary, and nothing here uses them.
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(config)


def rosa(model: nn.Module, job: Job) -> Contender:
    """Train ROSA's factors, and let the model go."""
    targets = ATTENTION if job.attention_only else None
    return rosa_of(rosa_func.skeleton(model), rosa_func.init(model, job.rank, targets=targets))


def peft_lora(model: nn.Module, job: Job) -> Contender:
    """Train LoRA factors on the same weights, with scale alpha / r = 1."""
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=job.rank,
        lora_dropout=0.0,  # it must be 0 for target_parameters
        target_modules=ATTENTION,
        target_parameters=None if job.attention_only else EXPERTS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        adapted = peft.get_peft_model(model, config)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    return Contender(lambda ids: adapted(ids, use_cache=False).logits, adamw(trainable))


CONTENDERS = {"rosa": rosa, "peft": peft_lora}


def speed(job: Job, s: Settings) -> Times:
    """Time training steps of both contenders, after a look at whether they do the same."""
    base = mixtral(job)
    ids, labels = tokens(base.config, (1, job.tokens))
    contenders = {name: make(copy.deepcopy(base), job) for name, make in CONTENDERS.items()}
    values = {name: trainable_values(contender) for name, contender in contenders.items()}
    if values["peft"] != values["rosa"]:
        raise RuntimeError(f"peft and ROSA would not train equally many values: {values}")
    with torch.no_grad():
        expected = loss(base(ids, use_cache=False).logits, labels)
        for name, contender in contenders.items():  # untrained, both are the model's own function
            first = loss(contender.logits(ids), labels)
            # A router may choose another expert by rounding, but hardly ever.
            torch.testing.assert_close(first, expected, atol=1e-2, rtol=0, msg=name)
    work = {
        name: partial(clocked, partial(train_step, contender, ids, labels))
        for name, contender in contenders.items()
    }
    return interleave(work, s.rounds, s.warmup, job.implementation)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def memory(job: Job, s: Settings) -> Times:
    """Measure each contender in processes of its own, in turn."""
    module = "examples.benchmark.experts"
    jobs = {name: json.dumps(job._replace(name=name)) for name in CONTENDERS}
    work = {name: partial(in_a_process, module, "--measure", of) for name, of in jobs.items()}
    return interleave(work, s.repeats, 0, f"peak memory, {job.implementation}")


def measure(job: Job) -> dict[str, float]:
    """Train three steps in this process; return its peak memory in MiB."""
    gc.collect()
    reset_peak_memory()
    libraries = peak_memory_of_this_process()
    model = mixtral(job)
    ids, labels = tokens(model.config, (1, job.tokens))
    contender = CONTENDERS[job.name](model, job)
    del model
    gc.collect()
    reset_peak_memory()
    before = peak_memory_of_this_process()
    for _ in range(3):
        train_step(contender, ids, labels)
    peak = peak_memory_of_this_process()
    return {"libraries": libraries, "before": before, "peak": peak, "above": peak - libraries}


def line(what: str, ours: float, theirs: float, unit: str, judged: bool | None = None) -> str:
    """Format two figures and their ratio; it is judged, is not at this size, or has no bar."""
    text = f"{what:36} {ours:10.4g} / {theirs:<10.4g} {unit:4} {ours / theirs:7.3f}"
    if judged is None:
        return text
    verdict = ("PASS" if ours <= BAR * theirs else "FAIL") if judged else "not judged"
    return f"{text}  at most {BAR:g}: {verdict}"


def report(job: Job, s: Settings, judged: bool) -> None:
    """Measure one implementation, and print its lines."""
    print(f"{job.implementation}, r={job.rank}, 1x{job.tokens} tokens")
    times = speed(job, s)
    ours, theirs = times["rosa"], times["peft"]
    for what, of, key, bar in (
        ("step, fastest", min, "seconds", judged),
        ("step, median", median, "seconds", None),
        ("step, least processor time", min, "processor", None),
    ):
        print(line(what, of(ours[key]), of(theirs[key]), "s", bar), flush=True)
    peaks = memory(job, s)
    ours, theirs = peaks["rosa"], peaks["peft"]
    for what, key, bar in (
        ("peak memory, whole process", "peak", judged),
        ("peak memory, above the libraries", "above", judged),
        ("held before the first step", "before", None),
    ):
        print(line(what, median(ours[key]), median(theirs[key]), "MiB", bar), flush=True)


def main() -> None:
    """Measure each implementation in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=positive, help=f"default {FULL.rank}")
    parser.add_argument("--rounds", type=positive, help=f"default {FULL.rounds}")
    parser.add_argument(
        "--tokens",
        type=positive,
        help=f"of one sequence; default {FULL.tokens}, batched_mm {FULL.copied_tokens}",
    )
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, nargs="+", default=IMPLEMENTATIONS
    )
    parser.add_argument(
        "--attention-only", action="store_true", help="leave the experts as they are"
    )
    parser.add_argument("--short", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # for the processes made here
    args = parser.parse_args()
    if peft is None:
        parser.exit(1, 'there is nothing to compare with: pip install "peft>=0.21"\n')
    if args.measure:
        print(json.dumps(measure(Job(*json.loads(args.measure)))))
        return
    s = TINY if args.short else FULL
    s = s._replace(rank=args.rank or s.rank, rounds=args.rounds or s.rounds)
    if args.tokens:
        s = s._replace(tokens=args.tokens, copied_tokens=args.tokens)
    print(f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", end=", ")
    print(f"peft {peft.__version__}, rosa_func {rosa_func.__version__}")
    print(f"{'figure':36} {'rosa':>10} / {'peft':10} {'':4} {'ratio':>7}")
    for implementation in args.implementation:
        length = s.copied_tokens if implementation == "batched_mm" else s.tokens
        sizes = (s.width, s.intermediate, s.vocabulary, s.rank)
        job = Job("", implementation, *sizes, length, args.attention_only)
        report(job, s, judged=not args.short and not args.attention_only)


if __name__ == "__main__":
    main()
