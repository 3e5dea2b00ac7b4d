"""Language modelling: E2E, ELI5, GSM8k (the reference given the prompt), code (every token)."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import rosa_func
from examples.experiments import base, corpora, gsm8k
from examples.experiments.task import Forward, Metrics, Task, digest
from examples.shared import text as shared
from examples.shared.caching import made_once

Batch = dict[str, Tensor]
Examples = list[shared.Example]


def load(kind: str, setting: dict[str, Any], data: Path | None, cache: Path) -> Task:
    """Return the task e2e, eli5, gsm8k or code with the model of the setting."""
    model, tokenizer = load_model(setting["model"], data, cache)
    splits = {
        split: examples(kind, split, setting, tokenizer, data, cache) for split in setting["rows"]
    }
    generate = None
    if setting.get("generate"):
        from examples.experiments import generation

        scored = (gsm8k if kind == "gsm8k" else generation).score
        generate = partial(scored, tokenizer=tokenizer, setting=setting, data=data)

    def batches(seed: int) -> Iterator[Batch]:
        return shared.batches(splits["train"], setting["batch"], seed, 0)

    def evaluated(forward: Forward, split: str) -> Metrics:
        return evaluate(forward, splits[split])

    weights = rosa_func.checkpoint.digest(dict(model.named_parameters()))
    identity = digest(weights, splits)
    return Task(model, [], batches, loss, evaluated, generate, digest=identity)


def load_model(name: str, data: Path | None, cache: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a base of bases.toml (base:NAME), smollm2, or a model of the Hub or a directory."""
    kind, _, of = name.partition(":")
    if kind == "base":
        directory = base.cached(of, data, cache)
        model = AutoModelForCausalLM.from_pretrained(directory)
        return model.eval(), AutoTokenizer.from_pretrained(directory)
    if kind == "tiny":  # of a folder of data that tiny.py made
        name = str((data or Path()) / of)
    if name == "smollm2":  # its GGUF takes half a minute to read, and every cell reads it
        name = str(made_once(cache / name, converted))
    return shared.load_model(name, torch.float32)


def converted(content: Path) -> None:
    """Write SmolLM2 in transformers' format."""
    model, tokenizer = shared.load_model("smollm2", torch.float32)
    del model.config.quantization_config  # it was dequantised, which save_pretrained overlooks
    stock = AutoModelForCausalLM.from_config(model.config)
    stock.load_state_dict(model.state_dict())
    stock.save_pretrained(content)
    tokenizer.save_pretrained(content)


def examples(
    kind: str,
    split: str,
    setting: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: Path | None,
    cache: Path,
) -> Examples:
    """Return the rows of a split in ids: as many as the setting says, chosen by a fixed seed."""
    size, length = setting["rows"][split], setting["length"]
    if kind == "code":
        blocks = base.cached_blocks(corpora.source(split), tokenizer, length, cache)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
        return [(row[:1], row[1:]) for row in blocks[order[: size or None]].tolist()]
    if kind == "gsm8k":
        return shared.encode(gsm8k.rows(split, data)[: size or None], tokenizer, length)
    rows = shared.load_rows(kind, split, None if data is None else data / kind)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return shared.encode([rows[i] for i in order[: size or None]], tokenizer, length)


def nll(forward: Forward, batch: Batch) -> Tensor:
    """Return the summed negative log-likelihood of the tokens that have a label."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    padded = {} if bool(mask.all()) else {"attention_mask": mask}
    logits = forward(input_ids=ids, use_cache=False, **padded).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def loss(forward: Forward, batch: Batch) -> Tensor:
    """Return the mean over the tokens of the batch."""
    return nll(forward, batch) / (batch["labels"] != -100).sum()


def evaluate(forward: Forward, rows: Examples) -> Metrics:
    """Return the NLL of a token, over all tokens alike, its perplexity, and the bits of a token."""
    mean = shared.mean_nll(partial(nll, forward), shared.by_length(rows))
    return {"loss": mean, "ppl": math.exp(min(mean, 700.0)), "bits": mean / math.log(2)}
