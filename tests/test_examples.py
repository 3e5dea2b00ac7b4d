"""The examples run as a user would run them, on data and a model made here."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import seeded, state_bytes
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rosa_func import checkpoint

FINETUNE = Path(__file__).parents[1] / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tiny GPT-2, its tokenizer, and rows in the form of E2E's."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = [
        {"mr": f"name[{n}]", "ref": f"The place is called {n}." + " It is good." * (i % 4)}
        for i, n in enumerate("abcdefghijklmnopqrst")
    ]
    for split in ("train", "dev", "test"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{split}.jsonl").write_text(lines + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["ref"] for row in rows], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    fast.save_pretrained(folder / "model")
    config = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    seeded(lambda: GPT2LMHeadModel(config)).save_pretrained(folder / "model")
    return folder


def finetune(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FINETUNE), "--model", str(folder / "model"), "--steps", "6"]
    command += ["--data", str(folder), "--eval-every", "3", "--out", str(folder / "out")]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


SAMPLERS = ["random", "top", "bottom", "projection", "lora", "additive"]


@pytest.mark.parametrize("method", ["full", "lora", *(f"rosa-{name}" for name in SAMPLERS)])
def test_finetune_learns_and_writes_what_it_prints(folder: Path, method: str):
    options = ["--rank", "4", "--rate", "0.01", "--resample-every", "2"]
    if method.startswith("rosa"):
        options += ["--sampler", method.removeprefix("rosa-")]
    done = finetune(folder, *options, "--method", method.partition("-")[0])
    assert done.returncode == 0, done.stderr
    name = method if method == "full" else f"{method}-r4"
    lines = (folder / "out" / f"e2e-model-{name}-s0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    dev = [record["nll"] for record in records if record["event"] == "dev"]
    assert [record["event"] for record in records].count("train") == 6
    assert min(dev) < dev[0]
    assert f"{records[-1]['perplexity']:.3f}" in done.stdout


def test_the_loss_is_of_the_references_tokens_each_counted_once(folder: Path):
    """Twenty references of four lengths, evaluated in batches; here one by one, unpadded."""
    done = finetune(folder, "--steps", "1", "--rank", "2", "--out", str(folder / "loss"))
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "loss").glob("*.jsonl")
    records = (json.loads(line) for line in path.read_text().splitlines())
    found = next(record for record in records if record["event"] == "dev")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    total, tokens = 0.0, 0
    for line in (folder / "dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["mr"] + "\n").input_ids
        reference = [*tokenizer(row["ref"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + reference])).logits[0].log_softmax(-1)
        for place, token in enumerate(reference, start=len(prompt)):
            total, tokens = total - scores[place - 1, token].item(), tokens + 1
    assert found["step"] == 0
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-5)


def test_finetune_reads_eli5(folder: Path):
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    eli5 = folder / "eli5"
    eli5.mkdir()
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"question": row["mr"], "answer": row["ref"]}) for row in rows]
        (eli5 / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--task", "eli5", "--data", str(eli5), "--rank", "2", "--steps", "1"]
    done = finetune(folder, *options)
    assert done.returncode == 0, done.stderr
    wrong = finetune(folder, "--task", "e2e", "--data", str(eli5))
    assert wrong.returncode == 1 and "expected the fields ('mr', 'ref')" in wrong.stderr


def test_finetune_says_what_a_data_folder_lacks(folder: Path):
    done = finetune(
        folder / "model", "--data", str(folder / "model"), "--model", str(folder / "model")
    )
    assert done.returncode == 1
    assert "expected train, dev and test.jsonl" in done.stderr


def test_a_killed_run_goes_on_with_the_same_bits(folder: Path):
    """Killed mid-cycle and right after a resample; dropout, moments and the order go on too."""
    options = ["--method", "rosa", "--rank", "2", "--resample-every", "4", "--save-every", "1"]
    options += ["--rate", "0.01", "--steps", "12", "--moments", "project", "--batch", "3"]
    whole, parts = folder / "whole", folder / "parts"
    assert finetune(folder, *options, "--out", str(whole)).returncode == 0
    name = "e2e-model-rosa-random-r2-s0"
    command = [sys.executable, str(FINETUNE), "--model", str(folder / "model"), *options]
    command += ["--data", str(folder), "--eval-every", "3", "--out", str(parts), "--resume"]
    for kill_at in (2, 5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
            while not _steps(parts / f"{name}.jsonl") >= kill_at:
                assert run.poll() is None, run.stdout and run.stdout.read()
                time.sleep(0.002)
            run.kill()
    assert 5 <= _steps(parts / f"{name}.jsonl") < 12
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = (_records(out / f"{name}.jsonl") for out in (whole, parts))
    assert one == other
    (state, extra), (state2, extra2) = (
        checkpoint.load(out / f"{name}.safetensors") for out in (whole, parts)
    )
    assert state_bytes(state) == state_bytes(state2)
    assert str(extra["optimizer"]) == str(extra2["optimizer"])
    assert torch.equal(extra["random"], extra2["random"])


def _records(path: Path) -> list[dict[str, object]]:
    """Return the lines without what time decides."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
    return [record for record in records if record["event"] != "config"]


def _steps(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"event": "train"' in line for line in lines)


def test_a_run_with_other_options_is_not_resumed(folder: Path):
    options = ["--rank", "2", "--save-every", "6", "--out", str(folder / "other")]
    assert finetune(folder, *options).returncode == 0
    done = finetune(folder, *options, "--resume", "--rate", "0.5")
    assert done.returncode == 1
    assert "is of a run with rate=None: resume with the same options" in done.stderr
