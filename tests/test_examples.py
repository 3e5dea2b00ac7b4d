"""The examples run as a user would run them, on data and a model made here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import seeded
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

FINETUNE = Path(__file__).parents[1] / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tiny GPT-2, its tokenizer, and rows in the form of E2E's."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = [{"mr": f"name[{n}]", "ref": f"The place is called {n}."} for n in "abcdefghijkl"]
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


@pytest.mark.parametrize(
    "method", [["full"], ["rosa", "--sampler", "projection", "--resample-every", "2"]]
)
def test_finetune_learns_and_writes_what_it_prints(folder: Path, method: list[str]):
    done = finetune(folder, "--rank", "4", "--rate", "0.01", "--method", *method)
    assert done.returncode == 0, done.stderr
    name = "full" if method == ["full"] else "rosa-projection-r4"
    lines = (folder / "out" / f"e2e-model-{name}-s0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    dev = [record["nll"] for record in records if record["event"] == "dev"]
    assert [record["event"] for record in records].count("train") == 6
    assert min(dev) < dev[0]
    assert f"{records[-1]['perplexity']:.3f}" in done.stdout


def test_finetune_says_what_a_data_folder_lacks(folder: Path):
    done = finetune(
        folder / "model", "--data", str(folder / "model"), "--model", str(folder / "model")
    )
    assert done.returncode == 1
    assert "expected train, dev and test.jsonl" in done.stderr
