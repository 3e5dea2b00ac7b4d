"""From nothing to a fine-tuned, merged model: no network, no download, minutes on two cores.

    python -m examples.quickstart [--short] [--cache DIR] [--out DIR]

1. Train a small stock GPT-2 on prose that every Python installation carries (once: it is cached).
2. Adapt it to source code of the standard library: full fine-tuning, LoRA and ROSA, with the same
   steps, data order and schedule. The loop to read is `adapt`.
3. Merge ROSA's weights into a fresh stock model: the same loss, and it generates.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from tensordict import TensorDict
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import rosa_func
from examples.shared.caching import made_once
from examples.shared.options import folder
from rosa_func import samplers

END = "<|endoftext|>"  # between two documents
SEED, BATCH = 0, 8
# Whole modules are held out, so that no line of them is trained on.
TRAINED_ON = ("argparse", "subprocess", "tarfile", "inspect", "typing", "configparser", "pdb")
HELD_OUT = ("difflib", "shutil", "threading", "statistics")
# Every matrix but the positions; "wte" are the embeddings, which are the output layer as well.
TARGETS = ("wte", "c_attn", "c_proj", "c_fc")
# Each the best, at the full budget, of 3e-4, 1e-3 and 3e-3 (full) or 3e-3, 1e-2 and 2e-2 (lora,
# rosa), by the final perplexity on modules beside these: optparse, calendar, tempfile.
RATES = {"full": 1e-3, "lora": 2e-2, "rosa": 1e-2}

Logits = Callable[[Tensor], Tensor]


class Base(NamedTuple):
    """What the base model is made from; the cache is keyed by it."""

    layers: int = 4
    width: int = 192
    heads: int = 4
    vocabulary: int = 2048
    block: int = 128
    documents: int = 1000  # all of them
    epochs: int = 4
    rate: float = 2e-3
    initializer_range: float = 0.07  # with GPT-2's 0.02 so narrow a model is slow to start


class Budget(NamedTuple):
    """What each method may spend on the adaptation."""

    rank: int = 8
    train_blocks: int = 320
    held_out_blocks: int = 96
    epochs: int = 4


class Task(NamedTuple):
    """What is equal for all methods: the tokens, (blocks, block), and the passes over them."""

    train: Tensor
    held_out: Tensor
    epochs: int


class Result(NamedTuple):
    """What came of one method; `curve` has pairs of step and held-out perplexity."""

    trainable: int
    seconds_a_step: float
    curve: list[tuple[int, float]]


SHORT = Base(2, 64, 2, 512, 64, 12, 1), Budget(4, 64, 16, 3)


def prose(documents: int) -> list[str]:
    """Return the topics of Python's own help, which is about the language, in prose."""
    return [text for _, text in sorted(topics.topics.items())][:documents]


def code(modules: tuple[str, ...]) -> list[str]:
    """Return the source code of modules of the standard library, without importing them."""
    specs = [importlib.util.find_spec(name) for name in modules]
    texts = [spec and spec.loader.get_source(spec.name) for spec in specs]
    if missing := [name for name, text in zip(modules, texts, strict=True) if not text]:
        raise SystemExit(f"this Python has no source code of {missing}; use one that has")
    return texts


def in_blocks(texts: list[str], tokenizer: Tokenizer, block: int) -> Tensor:
    """Return the tokens of all texts in one row, cut into blocks: (blocks, block)."""
    ids = [i for encoded in tokenizer.encode_batch([t + END for t in texts]) for i in encoded.ids]
    return torch.tensor(ids[: len(ids) // block * block]).view(-1, block)


def spread(blocks: Tensor, number: int) -> Tensor:
    """Return that many of the blocks, evenly spread over all of them."""
    return blocks[torch.arange(number) * len(blocks) // number]


def schedule(task: Task, rate: float) -> Iterator[list[tuple[Tensor, float]]]:
    """Yield for each epoch its batches and rates: one order for all, one linear decay."""
    generator = torch.Generator().manual_seed(SEED)
    steps = len(task.train) // BATCH
    for epoch in range(task.epochs):
        order = torch.randperm(len(task.train), generator=generator)[: steps * BATCH]
        yield [
            (task.train[rows], rate * (1 - (epoch * steps + step) / (task.epochs * steps)))
            for step, rows in enumerate(order.split(BATCH))
        ]


def train_epoch(
    logits: Logits,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, float]],
    bar: tqdm,
    cycle: int = 0,
) -> None:
    """Take one step of the optimizer for each batch."""
    for ids, rate in batches:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = total_nll(logits(ids), ids) / ids[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown = {"loss": f"{loss.item():.3f}", "rate": f"{rate:.1e}", "cycle": cycle}
        bar.set_postfix(shown, refresh=False)
        bar.update(ids.numel())


def progress(name: str, task: Task, hidden: bool = False) -> tqdm:
    """Return a bar that counts tokens, so that its rate is tokens per second."""
    tokens = task.train[: len(task.train) // BATCH * BATCH].numel() * task.epochs
    options = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True}
    return tqdm(total=tokens, desc=name, disable=hidden, **options)


def total_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the sum over all tokens of -log p(token | those before it in its block)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def mean_nll(logits: Logits, blocks: Tensor) -> float:
    """Return the total NLL over the total number of tokens."""
    nll = sum(total_nll(logits(ids), ids).item() for ids in blocks.split(2 * BATCH))
    return nll / blocks[:, 1:].numel()


def fine_tune_all(model: GPT2LMHeadModel, name: str, task: Task, rate: float) -> Result:
    """Train all parameters of the model in place: the base model, and full fine-tuning."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def logits(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    curve, seconds = [(0, math.exp(mean_nll(logits, task.held_out)))], 0.0
    with progress(name, task) as bar:
        for batches in schedule(task, rate):
            start = time.perf_counter()
            train_epoch(logits, optimizer, batches, bar)
            seconds += time.perf_counter() - start
            curve.append((curve[-1][0] + len(batches), math.exp(mean_nll(logits, task.held_out))))
    return Result(sum(p.numel() for p in model.parameters()), seconds / curve[-1][0], curve)


def adapt(
    model: GPT2LMHeadModel, name: str, task: Task, rate: float, rank: int
) -> tuple[Result, TensorDict]:
    """Fine-tune by LoRA or ROSA. The model is not written to: what is learnt is in the state."""
    sampler = {"lora": samplers.lora, "rosa": samplers.random}[name]
    state = rosa_func.init(model, rank, key=SEED, targets=TARGETS, sampler=sampler)
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), weight_decay=0.0)

    def logits(ids: Tensor) -> Tensor:  # of `state` as it is when this is called
        return rosa_func.call(model, state, ids, use_cache=False).logits

    curve, seconds, cycle = [(0, math.exp(mean_nll(logits, task.held_out)))], 0.0, 0
    with progress(name, task) as bar:
        for epoch, batches in enumerate(schedule(task, rate)):
            start = time.perf_counter()
            if name == "rosa" and epoch > 0:  # init has drawn the first subspaces
                new = rosa_func.resample(state, key=epoch)
                rosa_func.optim.rebind(optimizer, state, new)
                state, cycle = new, epoch
            train_epoch(logits, optimizer, batches, bar, cycle)
            seconds += time.perf_counter() - start
            curve.append((curve[-1][0] + len(batches), math.exp(mean_nll(logits, task.held_out))))
    return Result(rosa_func.count(state).trainable, seconds / curve[-1][0], curve), state


def cached_base(base: Base, cache: Path) -> Path:
    """Return the directory of the base model and its tokenizer; make it if it is not there."""
    texts = prose(base.documents)
    settings = {**base._asdict(), "prose": hashlib.sha256(END.join(texts).encode()).hexdigest()}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    directory = cache / f"base-{key}"
    if directory.exists():
        print(f"base model: cached in {directory}")
        return directory
    print(f"base model: training on {sum(map(len, texts)):,} characters of prose")

    def make(content: Path) -> None:
        tokenizer = ByteLevelBPETokenizer()  # of GPT-2's kind: no text is unknown to it
        tokenizer.train_from_iterator(
            texts, base.vocabulary, special_tokens=[END], show_progress=False
        )
        blocks = in_blocks(texts, tokenizer, base.block)
        train_base(base, tokenizer, blocks).save_pretrained(content)
        tokenizer.save(str(content / "tokenizer.json"))
        (content / "settings.json").write_text(json.dumps(settings, indent=2))

    return made_once(directory, make)


def train_base(base: Base, tokenizer: Tokenizer, blocks: Tensor) -> GPT2LMHeadModel:
    """Train a stock GPT-2 from scratch; the last twentieth of the prose is held out."""
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=base.block,
        n_embd=base.width,
        n_layer=base.layers,
        n_head=base.heads,
        initializer_range=base.initializer_range,
        # Without dropout train() and eval() are the same, and no step draws a random number.
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.token_to_id(END)),
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        torch.manual_seed(SEED)
        model = GPT2LMHeadModel(config).eval()
    cut = len(blocks) * 19 // 20
    task = Task(blocks[:cut], blocks[cut:], base.epochs)
    (_, before), *_, (_, after) = fine_tune_all(model, "base", task, base.rate).curve
    print(f"base model: perplexity on held-out prose {before:.0f} -> {after:.1f}")
    return model


def base_and_task(directory: Path, base: Base, budget: Budget) -> tuple[GPT2LMHeadModel, Task]:
    """Load the base model, and the source code that it is to be adapted to."""
    model = GPT2LMHeadModel.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    train, held_out = (in_blocks(code(of), tokenizer, base.block) for of in (TRAINED_ON, HELD_OUT))
    train, held_out = spread(train, budget.train_blocks), spread(held_out, budget.held_out_blocks)
    return model, Task(train, held_out, budget.epochs)


def table(results: dict[str, Result]) -> str:
    """Return the results as text."""
    before = next(iter(results.values())).curve[0][1]
    lines = [f"{'method':8}{'trainable values':>18}{'s/step':>9}{'held-out perplexity':>21}"]
    lines.append(f"{'(before)':8}{'':>18}{'':>9}{before:>21.2f}")
    lines += [
        f"{name:8}{result.trainable:>18,}{result.seconds_a_step:>9.3f}{result.curve[-1][1]:>21.2f}"
        for name, result in results.items()
    ]
    return "\n".join(lines)


def plot(results: dict[str, Result], path: Path) -> None:
    """Draw held-out perplexity over steps, a line for each method."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (name, result), marker in zip(results.items(), "osD", strict=True):
        axes.plot(*zip(*result.curve, strict=True), marker=marker, markersize=4, label=name)
    axes.set(xlabel="steps", ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()  # their labels would be powers of ten
    axes.set_title("GPT-2, from prose to source code")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def show_merged(
    directory: Path, model: GPT2LMHeadModel, state: TensorDict, held_out: Tensor
) -> None:
    """Load the merged weights into a fresh stock model, compare the loss, and generate."""
    fresh = GPT2LMHeadModel.from_pretrained(directory)
    fresh.load_state_dict(rosa_func.merge(state), strict=False)  # a tied weight comes once
    adapted = mean_nll(lambda ids: rosa_func.call(model, state, ids).logits, held_out)
    merged = mean_nll(lambda ids: fresh(ids).logits, held_out)
    print(f"held-out loss: {adapted:.6f} of model and state, {merged:.6f} of the merged model")
    if not math.isclose(adapted, merged, rel_tol=1e-4):
        raise SystemExit("the merged model computes something else: please report this")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("    def __init__(self").ids])
    ids = fresh.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
    )
    print(f"the merged model writes:\n\n{tokenizer.decode(ids[0].tolist())}\n")


def run(base: Base, budget: Budget, cache: Path, out: Path) -> None:
    """Train the base model, adapt it in three ways, and show what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    directory = cached_base(base, cache)
    model, task = base_and_task(directory, base, budget)
    print(f"adaptation to code: {task.train.numel():,} tokens, {task.held_out.numel():,} held out")
    results = {"full": fine_tune_all(copy.deepcopy(model), "full", task, RATES["full"])}
    for name in ("lora", "rosa"):
        results[name], state = adapt(model, name, task, RATES[name], budget.rank)
    print(f"\n{table(results)}\n")
    plot(results, out / "quickstart.png")
    metrics = {name: result._asdict() for name, result in results.items()}
    (out / "quickstart.json").write_text(json.dumps(metrics, indent=2))
    print(f"curves in {out / 'quickstart.png'}, numbers in {out / 'quickstart.json'}")
    show_merged(directory, model, state, task.held_out)


def main() -> None:
    """Read the command line; an interruption is no error to be traced."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model and a few dozen steps")
    parser.add_argument("--cache", type=folder, default="runs/quickstart", help="the base model's")
    parser.add_argument("--out", type=folder, default="runs/quickstart", help="for PNG and JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()  # of loading a model: there are enough bars
    try:
        base, budget = SHORT if args.short else (Base(), Budget())
        run(base, budget, args.cache, args.out)
    except KeyboardInterrupt:
        print("interrupted: a base model that was finished stays cached", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
