"""Classification: the backbone is adapted, and its new head is trained in full.

    python -m examples.classify [--data FILE] [--model NAME] [--short] [--cache DIR] [--out DIR]

Each line of FILE is a label, a tab and a text. Without it the task is to tell code from prose, both
of which come with Python. NAME is a model of the Hub or a folder; without it, the small GPT-2 of
the quickstart. The tuned classifier is loaded as any other:

    model = AutoModelForSequenceClassification.from_pretrained("runs/classify/tuned")
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import rosa_func
from examples.shared.options import folder, text_file
from examples.shared.small_gpt2 import SHORT, TRAINED_ON, Base, cached_base, code, prose

BATCH, RANK, RATE, LENGTH = 16, 4, 3e-3, 64
Rows = tuple[Tensor, Tensor, Tensor]  # ids and mask (rows x length), and labels (rows)


def rows_of(data: Path | None) -> list[tuple[str, str]]:
    """Return labels and texts."""
    if data is not None:
        rows = [line.split("\t", 1) for line in data.read_text(encoding="utf-8").splitlines()]
        if wrong := [row for row in rows if len(row) != 2]:
            raise SystemExit(f"{data}: expected lines of a label, a tab and a text, got {wrong[0]}")
        return [(label, line) for label, line in rows]
    texts = {"code": code(TRAINED_ON), "prose": prose(100)}
    lines = {of: [x.strip() for x in "\n".join(texts[of]).splitlines()] for of in texts}
    return [(of, line) for of in lines for line in lines[of] if len(line) > 20]


def encode(rows: list[tuple[str, str]], classes: list[str], tokenizer: Any) -> Rows:
    """Return the rows as tensors, each text cut or padded to the same length."""
    labels = torch.tensor([classes.index(label) for label, _ in rows])
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    encoded = tokenizer([text for _, text in rows], return_tensors="pt", **options)
    return encoded.input_ids, encoded.attention_mask, labels


def tune(model: PreTrainedModel, rows: Rows, steps: int) -> TensorDict:
    """Train factors in the backbone, and the head in full. The model is only read."""
    state = rosa_func.init(model, RANK, train="head")
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = torch.randint(len(rows[0]), (BATCH,), generator=generator)
        ids, mask, labels = (part[drawn] for part in rows)
        logits = rosa_func.call(model, state, ids, attention_mask=mask).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return state.detach()


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Rows) -> float:
    """Return the share of rows whose class a stock model scores highest."""
    ids, mask, labels = rows
    batches = zip(ids.split(BATCH), mask.split(BATCH), strict=True)
    scores = torch.cat([model(ids, attention_mask=mask).logits for ids, mask in batches])
    return (scores.argmax(-1) == labels).double().mean().item()


def main() -> None:
    """Read the rows, train on most of them, show the accuracy on the others, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=text_file, help="lines of a label, a tab and a text; else code and prose")
    add("--model", help="a model of the Hub or a folder; else the quickstart's")
    add("--short", action="store_true", help="a tiny model and a few dozen steps")
    add("--cache", type=folder, default="runs/quickstart", help="the base model's")
    add("--out", type=folder, default="runs/classify", help="for the tuned classifier")
    args = parser.parse_args()

    rows = rows_of(args.data)
    random.Random(0).shuffle(rows)
    classes = sorted({label for label, _ in rows})
    if len(classes) < 2 or len(rows) < 10:
        raise SystemExit(f"expected two classes and ten rows, got {classes} and {len(rows)} rows")
    name = args.model or cached_base(SHORT[0] if args.short else Base(), args.cache)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with torch.random.fork_rng(devices=[]):  # the new head is drawn from the global generator
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, id2label=dict(enumerate(classes)), pad_token_id=tokenizer.pad_token_id
        )
    cut = len(rows) // 10
    held_out, training = (encode(of, classes, tokenizer) for of in (rows[:cut], rows[cut:]))

    state = tune(model, training, steps=40 if args.short else 200)
    tuned = rosa_func.export.to_module(model, state)  # a stock model
    before, after = accuracy(model, held_out), accuracy(tuned, held_out)
    print(f"accuracy on {cut} held-out rows: {before:.2f} before, {after:.2f} after")
    tuned.save_pretrained(args.out / "tuned")
    tokenizer.save_pretrained(args.out / "tuned")
    print(f"the tuned classifier is in {args.out / 'tuned'}")


if __name__ == "__main__":
    main()
