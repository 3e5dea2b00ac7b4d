"""From nothing to a fine-tuned, merged model: no network, no download, minutes on two cores.

    python -m examples.quickstart [--short] [--cache DIR] [--out DIR]

1. Train a small stock GPT-2 on prose that every Python installation carries (once: it is cached).
2. Adapt it to source code of the standard library by full fine-tuning, LoRA, ROSA with one draw
   and ROSA that is resampled, with the same steps, data order and schedule. `adapt` is the loop.
3. Merge ROSA's weights into a fresh stock model: the same loss, and it generates.

On a busy machine put OMP_NUM_THREADS=1 before the command: threads that wait for each other crawl.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tensordict import TensorDict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.utils import logging

import rosa_func
from examples.shared.curves import Curve, plot, table
from examples.shared.options import folder
from examples.shared.small_gpt2 import (
    SEED,
    SHORT,
    TARGETS,
    Base,
    Budget,
    Data,
    base_and_data,
    perplexity,
    progress,
    schedule,
    total_nll,
)
from rosa_func import samplers

# Each the best, at the full budget, of 3e-4, 1e-3 and 3e-3 (full) or 3e-3, 1e-2 and 2e-2 (lora,
# rosa), by the final perplexity on modules beside these: optparse, calendar, tempfile. One draw
# has the rate of rosa, so that only the resamples differ.
RATES = {"full": 1e-3, "lora": 2e-2, "one draw": 1e-2, "rosa": 1e-2}
NOTES = """\
One draw is ROSA that is never resampled. The table shows that all four learn, and what they train.
It is one seed and a small model, so no ranking: for that see examples/experiments/RESULTS.md."""
NEXT = """\
Next:
  python -m examples.own_data --data FILE    a text file of your own, or a model of the Hub
  python -m examples.classify                classification, with a head
  python -m examples.trainer                 the same task with the transformers Trainer
  examples/README.md                         all examples, and how long they take
  examples/guide/training.md                 targets, ranks, samplers, rates, memory"""


def adapt(
    model: GPT2LMHeadModel, name: str, data: Data, rate: float, rank: int
) -> tuple[Curve, TensorDict]:
    """Fine-tune. The model is not written to: what is learnt is in the state."""
    if name == "full":
        state = rosa_func.init(model, train="*")
    else:
        sampler = samplers.lora if name == "lora" else samplers.random
        state = rosa_func.init(model, rank, key=SEED, targets=TARGETS, sampler=sampler)
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), weight_decay=0.0)

    def logits(ids: Tensor) -> Tensor:  # of `state` as it is when this is called
        return rosa_func.call(model, state, ids, use_cache=False).logits

    points, resamples, seconds, step = [(0, perplexity(logits, data.held_out))], [], 0.0, 0
    with progress(name, data) as bar:
        for epoch, batches in enumerate(schedule(data, rate)):
            start = time.perf_counter()
            if name == "rosa" and epoch > 0:  # init has drawn the first subspaces
                new = rosa_func.resample(state, key=epoch, donate=True)
                rosa_func.optim.rebind(optimizer, state, new)
                state = new
                resamples.append(step)
            for ids, now in batches:
                for group in optimizer.param_groups:
                    group["lr"] = now
                loss = total_nll(logits(ids), ids) / ids[:, 1:].numel()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.set_postfix(loss=loss.item(), rate=now, cycle=len(resamples), refresh=False)
                bar.update(ids.numel())
            seconds += time.perf_counter() - start
            points.append((step, perplexity(logits, data.held_out)))
    return Curve(rosa_func.count(state).trainable, seconds / step, points, resamples), state


def show_merged(
    directory: Path, model: GPT2LMHeadModel, state: TensorDict, held_out: Tensor
) -> None:
    """Load the merged weights into a fresh stock model, compare the loss, and generate."""
    fresh = GPT2LMHeadModel.from_pretrained(directory)
    fresh.load_state_dict(rosa_func.merge(state), strict=False)  # a tied weight comes once
    adapted = math.log(perplexity(lambda ids: rosa_func.call(model, state, ids).logits, held_out))
    merged = math.log(perplexity(lambda ids: fresh(ids).logits, held_out))
    print(f"held-out loss: {adapted:.6f} of model and state, {merged:.6f} of the merged model")
    if not math.isclose(adapted, merged, rel_tol=1e-4):
        raise SystemExit("the merged model computes something else: please report this")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("    def __init__(self").ids])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    text = tokenizer.decode(fresh.generate(prompt, **options)[0].tolist())
    print(f"the merged model writes:\n\n{text}\n")


def run(base: Base, budget: Budget, cache: Path, out: Path) -> None:
    """Train the base model, adapt it in four ways, and show what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    directory, model, data = base_and_data(base, budget, cache)
    print(f"adaptation to code: {data.train.numel():,} tokens, {data.held_out.numel():,} held out")
    curves = {}
    for name, rate in RATES.items():
        curves[name], state = adapt(model, name, data, rate, budget.rank)
    print(f"\n{table(curves)}\n\n{NOTES}\n")
    plot(curves, "GPT-2, from prose to source code: one seed, no ranking", out / "quickstart.png")
    metrics = {name: curve._asdict() for name, curve in curves.items()}
    (out / "quickstart.json").write_text(json.dumps(metrics, indent=2))
    print(f"curves in {out / 'quickstart.png'}, numbers in {out / 'quickstart.json'}")
    show_merged(directory, model, state, data.held_out)  # of rosa, the last
    print(NEXT)


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
