"""Fine-tune a causal language model on E2E or ELI5: full, LoRA, ROSA or robust in one custom loop.

    python -m examples.finetune --task e2e --model gpt2 --method rosa --rank 16
    python -m examples.finetune --task e2e --data DIR --model smollm2 --method lora --rank 8
    python -m examples.finetune --method robust --density 0.006 --rank 8 --sparse-after 64 --restart

Prints perplexity, the exponential of the total negative log-likelihood over the total number of
tokens, with dropout off and on the reference (the answer) only; the best step is chosen on dev and
reported on test. Every figure also goes to a file of JSON lines. With `--save-every N` a run that
was killed goes on with `--resume`, with the same bits as if it had not been. No run overwrites
another's files: with other options it needs another `--out`.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import rosa_func
from examples.finetune.log import Log
from examples.finetune.options import (
    RATES,
    deciding,
    files,
    label,
    logged,
    parse,
    refuse_other,
    set_aside,
)
from examples.shared.text import (
    Example,
    batches,
    by_length,
    encode,
    load_model,
    load_rows,
    mean_nll,
    rate_at,
    sample,
)

SPLITS = ("train", "dev", "test")
PROGRESS = ("step", "seconds", "cycle", "best")

Forward = Callable[..., Any]  # the model with some weights


def losses(forward: Forward, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed negative log-likelihood of the references."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = forward(**inputs, use_cache=False).logits
    wanted = batch["labels"] != -100
    return F.cross_entropy(logits[wanted].float(), batch["labels"][wanted], reduction="sum")


def mean_loss(forward: Forward, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean negative log-likelihood of a reference's token, to train by."""
    return losses(forward, batch) / (batch["labels"] != -100).sum()


def evaluate(forward: Forward, examples: list[Example]) -> float:
    """Return the mean negative log-likelihood of a reference's token."""
    groups = tqdm(by_length(examples), "evaluate", leave=False)
    return mean_nll(partial(losses, forward), groups)


class Run:
    """One run: what is trained, what trains it, and how far it is."""

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        """Start at step 0, from the weights of the model."""
        self.args = args
        self.peak = RATES[args.method] if args.rate is None else args.rate
        sampler = "lora" if args.method == "lora" else args.sampler
        self.sampler = getattr(rosa_func.samplers, sampler)
        if args.method == "full":
            state = rosa_func.init(model, train="*")
            # What the optimizer writes to is float32: 16 bits would round small steps off.
            self.state = state.replace({"trainable": state["trainable"].float()})
        else:
            try:
                self.state = rosa_func.init(model, args.rank, key=args.seed, sampler=self.sampler)
            except ValueError as error:  # a rank that some weight is too small for
                sys.exit(str(error))
        self.model = rosa_func.skeleton(model)  # from here on the weights live in the state alone
        self.start = None
        if args.method == "robust" and args.restart:  # from these; what is frozen is shared
            self.start = self.state.replace(trainable=self.state["trainable"].clone())
        self.optimizer = self.new_optimizer()
        self.step, self.seconds, self.cycle = 0, 0.0, 0
        self.best: dict[str, Any] = {"nll": math.inf, "step": 0, "weights": None}

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer of what the state trains, whose groups know their peak rates."""
        groups = rosa_func.optim.groups(self.state, values={"peak": self.args.sparse_rate})
        for group in groups:
            group.setdefault("peak", self.peak)
        return torch.optim.AdamW(groups, self.peak, weight_decay=0.0)

    def trainable(self) -> int:
        """Return how many values train."""
        return rosa_func.count(self.state).trainable

    def computing(self) -> TensorDict:
        """Return the state that the model computes with, in the model's dtype."""
        if self.args.method != "full":
            return self.state
        cast = self.state["trainable"].to(getattr(torch, self.args.dtype))
        return self.state.replace(trainable=cast)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the state of the moment."""
        return rosa_func.call(self.model, self.computing(), *args, **kwargs)

    def begin_sparse(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Give the weights a sparse part where the loss of these batches has large gradients."""
        self.state = rosa_func.sparse.begin(
            self.model, self.state, batches, mean_loss, self.args.density, start=self.start
        )
        new = self.new_optimizer()
        if self.args.restart:
            self.optimizer, self.start = new, None
        else:  # the factors are those that it has: their moments go on
            self.optimizer.add_param_group(new.param_groups[-1])

    def resample(self) -> None:
        """Begin a cycle: the schedule goes on, the optimizer with it."""
        key = rosa_func.fold_in(self.args.seed, self.step)
        alone = self.start is None  # which shares the residuals
        new = rosa_func.resample(self.state, key, sampler=self.sampler, donate=alone)
        moments = self.args.moments
        rosa_func.optim.rebind(self.optimizer, self.state, new, moments=moments)
        self.state, self.cycle = new, self.cycle + 1

    def train_step(self, batch: dict[str, Tensor], examples: list[Example]) -> dict[str, float]:
        """Take a step; return what is to be recorded of it. Of the examples some are scored."""
        start, args = time.perf_counter(), self.args
        self.model.train()
        if args.method == "robust" and self.step == args.sparse_after:
            stream = batches(examples, args.batch, args.seed, self.step)
            self.begin_sparse(islice(stream, args.score_batches))
        every = args.resample_every if args.method in ("rosa", "robust") else 0
        if every and self.step and self.step % every == 0:
            self.resample()
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, group["peak"], args.warmup, args.steps)
        rate = rate_at(self.step, self.peak, args.warmup, args.steps)
        loss = mean_loss(self.forward, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        tokens = int(batch["attention_mask"].sum())
        return {"nll": loss.item(), "rate": rate, "seconds": seconds, "tokens": tokens}

    def judge(self, dev: list[Example]) -> float:
        """Evaluate on dev, and keep the weights if they are the best so far."""
        self.model.eval()  # dropout off
        nll = evaluate(self.forward, dev)
        if not math.isfinite(nll):
            sys.exit(f"dev NLL is {nll} at step {self.step}: lower --rate {self.peak}")
        if nll < self.best["nll"]:
            merged = rosa_func.merge(self.computing())
            if self.args.method == "full":  # these are what the optimizer writes to
                merged = {name: w.clone() for name, w in merged.items()}
            self.best = {"nll": nll, "step": self.step, "weights": merged}
        return nll

    def save(self, path: Path) -> None:
        """Write all that the next step depends on."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        optimizer, random = self.optimizer.state_dict(), torch.get_rng_state()
        options = deciding(self.args)
        rosa_func.checkpoint.save(
            path, self.state, optimizer=optimizer, random=random, options=options, **progress
        )

    def load(self, path: Path) -> None:
        """Go on where `save` was called, with the same bits."""
        self.state, saved = rosa_func.checkpoint.load(path)
        refuse_other(path, saved["options"], self.args)
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])  # of dropout
        for name in PROGRESS:
            setattr(self, name, saved[name])
        if self.step > self.args.sparse_after:
            self.start = None


def read_rows(args: argparse.Namespace) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs of each split."""
    try:
        rows = {split: load_rows(args.task, split, args.data) for split in SPLITS}
    except OSError as error:
        source = args.data or "the Hub (pass --data)"
        sys.exit(f"the data of {args.task} cannot be loaded from {source}: {error}")
    if len(rows["train"]) < args.batch:
        sys.exit(f"--batch {args.batch} is more than the {len(rows['train'])} rows of train")
    return rows


def train(run: Run, splits: dict[str, list[Example]], log: Log, checkpoint: Path) -> None:
    """Take the steps that are left, with dev and a checkpoint where they are due."""
    args = run.args
    stream = batches(splits["train"], args.batch, args.seed, run.step)
    progress = tqdm(total=args.steps, initial=run.step, desc=label(args))
    while run.step < args.steps:
        record = run.train_step(next(stream), splits["train"])
        log("train", run.step, **record)
        progress.set_postfix(
            loss=f"{record['nll']:.3f}",
            rate=f"{record['rate']:.1e}",
            tokens_s=f"{record['tokens'] / record['seconds']:.0f}",
            cycle=run.cycle,
        )
        progress.update()
        last = run.step == args.steps
        if last or run.step % args.eval_every == 0:
            log("dev", run.step, nll=run.judge(splits["dev"]))
        if args.save_every and (last or run.step % args.save_every == 0):
            run.save(checkpoint)
    progress.close()


def report(run: Run, test: list[Example], log: Log) -> None:
    """Evaluate the best weights on test."""
    best, seconds = run.best, run.seconds / max(1, run.step)
    run.model.eval()  # dropout off

    def forward(**inputs: Any) -> Any:
        return functional_call(run.model, best["weights"], (), inputs)

    nll = evaluate(forward, test)
    log("test", run.step, nll=nll, perplexity=math.exp(nll), best=best["step"], dev=best["nll"])
    print(
        f"{label(run.args)}: {run.trainable():,} trainable values, {seconds:.2f} s/step, "
        f"best at step {best['step']}: dev perplexity {math.exp(best['nll']):.3f}, "
        f"test perplexity {math.exp(nll):.3f} (NLL {nll:.4f})\nlog: {log.path}"
    )


def main() -> None:
    """Train, choose on dev, report on test."""
    args = parse()
    file, checkpoint = files(args)
    goes_on = args.resume and checkpoint.exists()
    if not goes_on:
        refuse_other(file, logged(file), args)
    if args.resume and not goes_on:
        print(f"there is no checkpoint {checkpoint}: the run starts anew")
    rows = read_rows(args)
    torch.manual_seed(args.seed)  # of dropout
    try:
        model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        sys.exit(f"--model {args.model} cannot be loaded: {str(error).splitlines()[0]}")
    splits = {split: encode(rows[split], tokenizer, args.max_length) for split in SPLITS}
    splits["dev"] = sample(splits["dev"], args.dev, 0)
    splits["test"] = sample(splits["test"], args.test, 0)
    run = Run(args, model)
    del model

    args.out.mkdir(parents=True, exist_ok=True)
    if goes_on:
        run.load(checkpoint)
    else:
        set_aside(file, checkpoint)
    log = Log(file, run.step)
    if not run.step:
        fields = {"peak": run.peak, "trainable": run.trainable(), "torch": torch.__version__}
        log("config", 0, **vars(args), **fields)
        log("dev", 0, nll=run.judge(splits["dev"]))
    at = f"dev NLL {run.best['nll']:.4f} at {run.best['step']}"
    print(f"{label(args)}: {run.trainable():,} trainable values; {at}")
    train(run, splits, log, checkpoint)
    report(run, splits["test"], log)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
