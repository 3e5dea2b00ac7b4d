"""Fine-tune a causal language model on E2E or ELI5: full, LoRA or ROSA in one custom loop.

    python examples/finetune.py --task e2e --model gpt2 --method rosa --rank 16
    python examples/finetune.py --task e2e --data DIR --model smollm2 --method lora --rank 8

Prints perplexity, the exponential of the total negative log-likelihood over the total number of
tokens, with dropout off and on the reference (the answer) only; the best step is chosen on dev and
reported on test. Every figure also goes to a file of JSON lines. With `--save-every N` a run that
was killed goes on with `--resume`, with the same bits as if it had not been.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from finetune_data import (
    Example,
    batches,
    collate,
    encode,
    load_model,
    load_rows,
    rate_at,
    sample,
)
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import rosa_func

RATES = {"full": 1e-4, "lora": 1e-3, "rosa": 1e-3}
PROGRESS = ("step", "seconds", "cycle", "best")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=["e2e", "eli5"], default="e2e")
    parser.add_argument("--data", type=Path, help="folder with train, dev and test.jsonl (or Hub)")
    parser.add_argument("--model", default="gpt2", help="a Hub name, a directory, or smollm2")
    parser.add_argument("--method", choices=["full", "lora", "rosa"], default="rosa")
    samplers = ["random", "top", "bottom", "projection", "lora", "additive"]
    parser.add_argument("--sampler", choices=samplers, default="random", help="of rosa")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--resample-every", type=int, default=100, help="steps; 0 for never")
    parser.add_argument("--rate", type=float, help=f"peak learning rate; by method: {RATES}")
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--max-length", type=int, default=256, help="tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eval-every", type=int, default=100, help="steps")
    parser.add_argument("--dev", type=int, default=128, help="dev references; 0 for all")
    parser.add_argument("--test", type=int, default=512, help="test references; 0 for all")
    parser.add_argument("--moments", choices=["reset", "project", "keep"], default="reset")
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0 for no checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    return parser.parse_args()


def losses(model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Return the summed negative log-likelihood of the references."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = functional_call(model, weights, (), {**inputs, "use_cache": False}).logits
    wanted = batch["labels"] != -100
    return F.cross_entropy(logits[wanted].float(), batch["labels"][wanted], reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, weights: dict[str, Tensor], examples: list[Example]) -> float:
    """Return the mean negative log-likelihood of a reference's token, dropout off."""
    model.eval()
    examples = sorted(examples, key=lambda e: len(e[0]) + len(e[1]))  # little padding
    total, tokens = 0.0, 0
    for start in tqdm(range(0, len(examples), 16), "evaluate", leave=False):
        batch = collate(examples[start : start + 16])
        total += losses(model, weights, batch).item()
        tokens += int((batch["labels"] != -100).sum())
    return total / tokens


class Run:
    """One run: what is trained, what trains it, and how far it is."""

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        """Start at step 0, from the weights of the model."""
        self.args = args
        self.peak = RATES[args.method] if args.rate is None else args.rate
        name = "lora" if args.method == "lora" else args.sampler
        self.sampler = getattr(rosa_func.samplers, name)
        if args.method == "full":  # a state of which every parameter is trained in full
            values = {name: p.detach().float().clone() for name, p in model.named_parameters()}
            kept = model.state_dict().keys()
            buffers = {name: b for name, b in model.named_buffers() if name in kept}
            self.state = TensorDict({"frozen": buffers, "trainable": values, "input_dim": {}})
        else:
            self.state = rosa_func.init(model, args.rank, key=args.seed, sampler=self.sampler)
        self.model = rosa_func.skeleton(model)  # from here on the weights live in the state alone
        parameters = rosa_func.parameters(self.state)
        self.optimizer = torch.optim.AdamW(parameters, self.peak, weight_decay=0.0)
        self.step, self.seconds, self.cycle = 0, 0.0, 0
        self.best: dict[str, Any] = {"nll": math.inf, "step": 0, "weights": {}}

    def weights(self) -> dict[str, Tensor]:
        """Return what the model computes with, in its own dtype."""
        weights = rosa_func.compose(self.state)
        if self.args.method != "full":
            return weights
        return {name: w.to(getattr(torch, self.args.dtype)) for name, w in weights.items()}

    def resample(self) -> None:
        """Begin a cycle: the schedule goes on, the optimizer with it."""
        key = rosa_func.fold_in(self.args.seed, self.step)
        new = rosa_func.resample(self.state, key, sampler=self.sampler)
        moments = self.args.moments
        rosa_func.optim.rebind(self.optimizer, self.state, new, moments=moments)
        self.state, self.cycle = new, self.cycle + 1

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Take a step; return what is to be recorded of it."""
        start, args = time.perf_counter(), self.args
        every = args.resample_every if args.method == "rosa" else 0
        if every and self.step and self.step % every == 0:
            self.resample()
        rate = rate_at(self.step, self.peak, args.warmup, args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss = losses(self.model, self.weights(), batch) / (batch["labels"] != -100).sum()
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
        nll = evaluate(self.model, self.weights(), dev)
        if not math.isfinite(nll):
            sys.exit(f"dev NLL is {nll} at step {self.step}: lower --rate {self.peak}")
        if nll < self.best["nll"]:
            merged = rosa_func.merge(self.state)
            if self.args.method == "full":
                merged = {name: w.detach().clone() for name, w in self.weights().items()}
            self.best = {"nll": nll, "step": self.step, "weights": merged}
        return nll

    def save(self, path: Path) -> None:
        """Write all that the next step depends on."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        optimizer, random = self.optimizer.state_dict(), torch.get_rng_state()
        options = given(self.args)
        rosa_func.checkpoint.save(
            path, self.state, optimizer=optimizer, random=random, options=options, **progress
        )

    def load(self, path: Path) -> None:
        """Go on where `save` was called, with the same bits."""
        self.state, saved = rosa_func.checkpoint.load(path)
        now = given(self.args)
        if other := [f"{k}={saved['options'][k]}" for k in now if now[k] != saved["options"][k]]:
            sys.exit(f"{path} is of a run with {', '.join(other)}: resume with the same options")
        parameters = rosa_func.parameters(self.state)
        self.optimizer = torch.optim.AdamW(parameters, self.peak, weight_decay=0.0)
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])  # of dropout
        for name in PROGRESS:
            setattr(self, name, saved[name])


def given(args: argparse.Namespace) -> dict[str, str]:
    """Return the options that decide the result."""
    without = ("out", "resume", "save_every", "data")
    return {name: str(value) for name, value in vars(args).items() if name not in without}


class Log:
    """JSON lines, and TensorBoard scalars where it is installed."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the lines up to that step, which a resumed run does not repeat."""
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
        whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = [line for line, r in whole if r["step"] <= step and r["event"] != "test"]
        path.write_text("".join(kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(path.with_suffix(""), purge_step=step + 1)

    def __call__(self, event: str, step: int, **fields: Any) -> None:
        """Write a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **fields}, default=str) + "\n")
        for name, value in fields.items():
            if self.writer and isinstance(value, float):
                self.writer.add_scalar(f"{event}/{name}", value, step)


def main() -> None:
    """Train, choose on dev, report on test."""
    args = parse()
    torch.manual_seed(args.seed)  # of dropout
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    splits = {
        split: encode(load_rows(args.task, split, args.data), tokenizer, args.max_length)
        for split in ("train", "dev", "test")
    }
    splits["dev"] = sample(splits["dev"], args.dev, 0)
    splits["test"] = sample(splits["test"], args.test, 0)
    if len(splits["train"]) < args.batch:
        sys.exit(f"--batch {args.batch} is more than the {len(splits['train'])} rows of train")

    name = args.method if args.method != "rosa" else f"rosa-{args.sampler}"
    rank = "" if args.method == "full" else f"-r{args.rank}"
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{args.task}-{Path(args.model).name}-{name}{rank}-s{args.seed}"
    file, checkpoint = (stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".safetensors"))
    run = Run(args, model)
    del model
    trainable = rosa_func.count(run.state).trainable
    if args.resume and checkpoint.exists():
        run.load(checkpoint)
    log = Log(file, run.step)
    if not run.step:
        log("config", 0, **vars(args), peak=run.peak, trainable=trainable, torch=torch.__version__)
        log("dev", 0, nll=run.judge(splits["dev"]))
    print(f"{name}: {trainable:,} trainable values; dev NLL {run.best['nll']:.4f} at {run.step}")

    stream = batches(splits["train"], args.batch, args.seed, run.step)
    progress = tqdm(total=args.steps, initial=run.step, desc=name)
    while run.step < args.steps:
        record = run.train_step(next(stream))
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

    best = run.best
    test = evaluate(run.model, best["weights"], splits["test"])
    log("test", run.step, nll=test, perplexity=math.exp(test), best=best["step"], dev=best["nll"])
    print(
        f"{name}: {trainable:,} trainable values, {run.seconds / max(1, run.step):.2f} s/step, "
        f"best at step {best['step']}: dev perplexity {math.exp(best['nll']):.3f}, "
        f"test perplexity {math.exp(test):.3f} (NLL {test:.4f})\nlog: {file}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
