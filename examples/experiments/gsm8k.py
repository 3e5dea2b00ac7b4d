"""GSM8k: problems of arithmetic in words. Dev is a part of train; the final number is judged."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from examples.experiments.decoding import generate
from examples.experiments.task import Metrics
from examples.shared.text import load_rows

Rows = list[tuple[str, str]]  # question and answer
DEV = 500  # of the rows of train
NUMBER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def rows(split: str, data: Path | None) -> Rows:
    """Return the rows of a split in an order by a fixed seed, so that the first are a sample."""
    if data is None:
        raise SystemExit("gsm8k is read from --data DIR/gsm8k")
    found = load_rows("gsm8k", "test" if split == "test" else "train", data / "gsm8k")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [found[i] for i in order]
    held_out = min(DEV, len(mixed) // 10)
    return {"train": mixed[held_out:], "dev": mixed[:held_out], "test": mixed}[split]


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    setting: dict[str, Any],
    data: Path | None,
) -> Metrics:
    """Let a merged model answer questions of test greedily; return the part that is right."""
    asked = rows("test", data)[: setting["generate"]]
    questions = [question for question, _ in asked]
    texts = generate(model.eval(), tokenizer, questions, setting)
    return {"exact_match": exact_match(texts, [answer for _, answer in asked])}


def exact_match(texts: list[str], answers: list[str]) -> float:
    """Return the part of the texts whose final number is the answer's."""
    both = zip(map(final_number, texts), map(final_number, answers), strict=True)
    return sum(a is not None and a == b for a, b in both) / len(texts)


def final_number(text: str) -> Fraction | None:
    """Return the number after the first ####, or None if there is none."""
    found = NUMBER.search(text)
    return Fraction(found[1].replace(",", "")) if found else None
