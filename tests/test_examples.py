"""The examples run as a user would run them, on data and a model made here."""

import ast
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import rosa_func
from cases import SAMPLER_NAMES
from examples.shared.curves import Curve, plot
from examples.shared.small_gpt2 import SHORT, Base, Budget, base_and_data, cached_base, perplexity
from models import seeded
from references import state_bytes
from rosa_func import checkpoint

ROOT = Path(__file__).parents[1]  # where the examples are run from
FINETUNE = [sys.executable, "-m", "examples.finetune"]


class ScriptEnd(NamedTuple):
    """How a script ended, and what it printed."""

    code: int
    out: str
    err: str


RunExample = Callable[..., ScriptEnd]


def import_example(name: str) -> ModuleType:
    """Import what `python -m examples.NAME` runs."""
    main = ".__main__" if (ROOT / "examples" / name).is_dir() else ""
    return importlib.import_module(f"examples.{name}{main}")


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> RunExample:
    """Run an example in this process, which spares its imports."""

    def run(name: str, *options: object) -> ScriptEnd:
        module = import_example(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        code: int | str | None = 0
        with torch.random.fork_rng(devices=[]):
            try:
                module.main()
            except SystemExit as end:
                code = end.code
        printed = capsys.readouterr()
        if isinstance(code, str):  # what Python prints before it exits with 1
            return ScriptEnd(1, printed.out, printed.err + code)
        return ScriptEnd(code or 0, printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tiny GPT-2, its tokenizer, and rows in the form of E2E's."""
    data_folder = tmp_path_factory.mktemp("finetune")
    rows = [
        {"mr": f"name[{n}]", "ref": f"The place is called {n}." + " It is good." * (i % 4)}
        for i, n in enumerate("abcdefghijklmnopqrst")
    ]
    for split in ("train", "dev", "test"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (data_folder / f"{split}.jsonl").write_text(lines + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["ref"] for row in rows], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    fast.save_pretrained(data_folder / "model")
    config = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    seeded(lambda: GPT2LMHeadModel(config)).save_pretrained(data_folder / "model")
    return data_folder


@pytest.fixture(scope="module")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that has the base model of `--short`."""
    cache = tmp_path_factory.mktemp("cache")
    cached_base(SHORT[0], cache)
    return cache


def test_the_examples_import_each_other_in_one_way():
    """Some found siblings by sys.path, and `figures` and `report` imported each other."""
    graph: dict[str, set[str]] = {}
    for path in sorted((ROOT / "examples").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: an import is absolute"
                graph[name] |= {str(node.module)}
                graph[name] |= {f"{node.module}.{alias.name}" for alias in node.names}
    siblings = {name.rpartition(".")[2] for name in graph}
    for name, imported in graph.items():
        assert not siblings & imported, f"{name} imports a sibling by sys.path"
    own = {name: imported & graph.keys() for name, imported in graph.items()}
    order = list(TopologicalSorter(own).static_order())  # or a CycleError that names it
    assert set(order) == set(graph)


def test_every_command_that_is_written_down_is_there_and_the_index_has_them_all():
    sources = sorted((ROOT / "examples").rglob("*.py"))
    pages = [ROOT / "README.md", ROOT / ".ci/run", *(ROOT / "examples").rglob("*.md"), *sources]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(python|torchrun).* examples/\w+\.py", text), page
        for name in re.findall(r"-m examples\.([a-z_.]*[a-z])", text):
            assert importlib.util.find_spec(f"examples.{name}"), f"{page}: {name}"
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in sources:
        if "def main()" in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert f"`python -m {name.removesuffix('.__main__')}" in index


def options_of_a_run(data_folder: Path, out: str, *options: object) -> list[object]:
    """Return the arguments of `run_example` for a finetune of the tiny model on its data."""
    start = ["--model", data_folder / "model", "--data", data_folder, "--out", data_folder / out]
    return ["finetune", *start, *options]


def options_of_6_steps(data_folder: Path, out: str, *options: object) -> list[object]:
    """Return the arguments of `run_example` for a finetune of 6 steps; later options win."""
    return options_of_a_run(data_folder, out, "--steps", 6, "--eval-every", 3, *options)


def options_of_a_step(data_folder: Path, out: str, *options: object) -> list[object]:
    """Return the arguments of `run_example` for a finetune of one step; later options win."""
    short = ["--steps", 1, "--rank", 2, "--max-length", 64]
    return options_of_a_run(data_folder, out, *short, *options)


@pytest.mark.parametrize("method", ["full", "lora", *(f"rosa-{name}" for name in SAMPLER_NAMES)])
def test_finetune_learns_and_writes_what_it_prints(
    run_example: RunExample, data_folder: Path, method: str
):
    options = ["--rank", 4, "--rate", 0.01, "--resample-every", 2]
    if method.startswith("rosa"):
        options += ["--sampler", method.removeprefix("rosa-")]
    options += ["--method", method.partition("-")[0]]
    done = run_example(*options_of_6_steps(data_folder, "out", *options))
    assert done.code == 0, done.err
    name = method if method == "full" else f"{method}-r4"
    lines = (data_folder / "out" / f"e2e-model-{name}-s0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    dev = [record["nll"] for record in records if record["event"] == "dev"]
    assert [record["event"] for record in records].count("train") == 6
    assert min(dev) < dev[0]
    assert f"{records[-1]['perplexity']:.3f}" in done.out


def test_finetune_counts_each_token_of_the_references_once(
    run_example: RunExample, data_folder: Path
):
    """It takes references of four lengths in batches; here they are taken one by one, unpadded."""
    done = run_example(*options_of_6_steps(data_folder, "loss", "--steps", 1, "--rank", 2))
    assert done.code == 0, done.err
    (path,) = (data_folder / "loss").glob("*.jsonl")
    records = (json.loads(line) for line in path.read_text().splitlines())
    found = next(record for record in records if record["event"] == "dev")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_folder / "model")
    model = GPT2LMHeadModel.from_pretrained(data_folder / "model").eval()
    total, tokens = 0.0, 0
    for line in (data_folder / "dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["mr"] + "\n").input_ids
        reference = [*tokenizer(row["ref"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + reference])).logits[0].log_softmax(-1)
        for place, token in enumerate(reference, start=len(prompt)):
            total, tokens = total - scores[place - 1, token].item(), tokens + 1
    assert found["step"] == 0
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-5)


def test_finetune_reads_eli5(run_example: RunExample, data_folder: Path):
    rows = [json.loads(line) for line in (data_folder / "dev.jsonl").read_text().splitlines()]
    eli5 = data_folder / "eli5"
    eli5.mkdir()
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"question": row["mr"], "answer": row["ref"]}) for row in rows]
        (eli5 / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    done = run_example(*options_of_a_step(data_folder, "out", "--task", "eli5", "--data", eli5))
    assert done.code == 0
    assert "test perplexity" in done.out


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (None, "expected train, dev and test.jsonl"),
        ("", "has no rows"),
        ('{"question": "a", "answer": "b"}\n', "expected the fields ('mr', 'ref')"),
        ('{"mr": "a", "ref": "b"}\n', "--batch 4 is more than the 1 rows of train"),
    ],
)
def test_finetune_checks_its_data_before_it_loads_a_model(
    run_example: RunExample, data_folder: Path, tmp_path: Path, lines: str | None, complaint: str
):
    for split in ("train", "dev", "test") if lines is not None else ():
        (tmp_path / f"{split}.jsonl").write_text(lines)
    done = run_example(
        *options_of_a_step(data_folder, "none", "--data", tmp_path, "--model", "/nonexistent")
    )
    assert done.code == 1
    assert complaint in done.err


def test_finetune_says_in_one_line_that_the_hub_gives_no_data(
    run_example: RunExample,
    monkeypatch: pytest.MonkeyPatch,
):
    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(import_example("finetune"), "load_rows", unreachable)
    done = run_example("finetune")
    said = "the data of e2e cannot be loaded from the Hub (pass --data): Couldn't reach it"
    assert done == ScriptEnd(1, "", said)


def test_finetune_says_in_one_line_that_there_is_no_model(
    run_example: RunExample, data_folder: Path, tmp_path: Path
):
    for model in ("/nonexistent", tmp_path):
        done = run_example(*options_of_a_step(data_folder, "none", "--model", model))
        assert done.code == 1
        assert f"--model {model} cannot be loaded: " in done.err.splitlines()[-1]
        assert not (data_folder / "none").exists()


def test_finetune_says_in_one_line_that_a_rank_is_too_large(
    run_example: RunExample, data_folder: Path
):
    done = run_example(*options_of_a_step(data_folder, "none", "--rank", 17))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("rank 17 is larger than")
    assert not (data_folder / "none").exists()


@pytest.mark.parametrize(
    "option",
    [
        *("--rank 0", "--rank -1", "--rank 1.5", "--batch 0", "--eval-every 0", "--steps -3"),
        *("--resample-every -1", "--warmup -1", "--max-length 1", "--dev -1", "--test -1"),
        *("--save-every -1", "--seed x", "--rate 0", "--rate -0.1", "--rate nan", "--rate inf"),
        *("--rate x", f"--data {__file__}", f"--out {__file__}", f"--out {__file__}/below"),
    ],
)
def test_finetune_refuses_an_option_that_has_no_meaning(run_example: RunExample, option: str):
    done = run_example("finetune", *option.split())
    name, value = option.split()
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert f"argument {name}: " in last
    assert value.removesuffix("/below") in last


def test_the_help_of_finetune_has_every_default(
    run_example: RunExample, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "300")
    options = run_example("finetune", "--help").out.split("\n  --")[1:]
    assert len(options) == 26
    assert [text for text in options if "(default: " not in text or "None" in text] == []


def test_finetune_without_a_checkpoint_to_resume_starts_anew_and_keeps_the_log(
    run_example: RunExample, data_folder: Path
):
    options = options_of_a_step(data_folder, "anew")
    assert run_example(*options).code == 0
    log = data_folder / "anew" / "e2e-model-rosa-random-r2-s0.jsonl"
    first = log.read_bytes()
    done = run_example(*options, "--resume")
    assert done.code == 0
    assert f"there is no checkpoint {log.with_suffix('.safetensors')}" in done.out
    assert f"{log} is now {log.name}.1" in done.out
    assert log.with_name(f"{log.name}.1").read_bytes() == first
    assert records_without_times(log) == records_without_times(log.with_name(f"{log.name}.1"))
    run_example(*options, "--save-every", 1)
    run_example(*options)  # the log and its checkpoint get one number
    names = {path.name.removeprefix(log.stem) for path in log.parent.iterdir()}
    assert names == {".jsonl", ".jsonl.1", ".jsonl.2", ".jsonl.3", ".safetensors.3"}


@pytest.mark.parametrize("option", ["--steps 2", "--rate 0.5", "--resample-every 7", "--data"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_finetune_does_not_resume_or_overwrite_a_run_with_other_options(
    run_example: RunExample, data_folder: Path, tmp_path: Path, option: str, resume: list[str]
):
    out = tmp_path / "out"
    options = options_of_a_step(data_folder, "none", "--out", out, "--save-every", 1)
    assert run_example(*options).code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    if option == "--data":
        option = f"--data {shutil.copytree(data_folder, tmp_path / 'copy')}"
    done = run_example(*options, *option.split(), *resume)
    was = {"--steps": "steps=1", "--rate": "rate=None", "--data": f"data={data_folder}"}
    name = option.split()[0]
    assert done.code == 1
    assert f"is of a run with {was.get(name, 'resample_every=100')}: resume with the" in done.err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_killed_finetune_goes_on_with_the_same_bits(run_example: RunExample, data_folder: Path):
    """Killed mid-cycle and right after a resample; dropout, moments and the order go on too."""
    options = ["--method", "rosa", "--rank", "2", "--resample-every", "4", "--save-every", "1"]
    options += ["--rate", "0.01", "--steps", "12", "--moments", "project", "--batch", "3"]
    whole, parts = data_folder / "whole", data_folder / "parts"
    assert run_example(*options_of_6_steps(data_folder, "whole", *options)).code == 0
    name = "e2e-model-rosa-random-r2-s0"
    command = [*FINETUNE, "--model", str(data_folder / "model"), *options]
    command += ["--data", str(data_folder), "--eval-every", "3", "--out", str(parts), "--resume"]
    for kill_at in (2, 5):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, **pipes) as run:
            while not logged_steps(parts / f"{name}.jsonl") >= kill_at:
                assert run.poll() is None, run.stdout and run.stdout.read()
                time.sleep(0.002)
            run.kill()
    assert 5 <= logged_steps(parts / f"{name}.jsonl") < 12
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = (records_without_times(out / f"{name}.jsonl") for out in (whole, parts))
    assert one == other
    (state, extra), (state2, extra2) = (
        checkpoint.load(out / f"{name}.safetensors") for out in (whole, parts)
    )
    assert state_bytes(state) == state_bytes(state2)
    assert str(extra["optimizer"]) == str(extra2["optimizer"])
    assert torch.equal(extra["random"], extra2["random"])


def records_without_times(path: Path) -> list[dict[str, object]]:
    """Return the lines of a log without their times."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
    return [record for record in records if record["event"] != "config"]


def logged_steps(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"event": "train"' in line for line in lines)


def test_trainer_refuses_an_interval_of_no_steps(run_example: RunExample):
    for every in (0, -2):
        done = run_example("trainer", "--every", every)
        assert done.code == 2
        assert f"argument --every: expected an integer of at least 1, got '{every}'" in done.err


def test_trainer_resumes_from_a_checkpoint_or_says_that_there_is_none(
    run_example: RunExample,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    seen: list[str | None] = []
    monkeypatch.setattr(import_example("trainer"), "train", lambda args, last: seen.append(last))
    for out in (tmp_path / "absent", tmp_path):
        done = run_example("trainer", "--out", out, "--resume")
        assert done == ScriptEnd(0, f"there is no checkpoint in {out}: the run starts anew\n", "")
    (tmp_path / "checkpoint-8").mkdir()
    assert run_example("trainer", "--out", tmp_path).out == ""
    assert run_example("trainer", "--out", tmp_path, "--resume").out == ""
    assert seen == [None, None, None, str(tmp_path / "checkpoint-8")]


@pytest.mark.parametrize(("name", "inner"), [("quickstart", "run"), ("trainer", "train")])
def test_an_interrupted_example_prints_one_line(
    run_example: RunExample,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    inner: str,
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_example(name), inner, interrupted)
    done = run_example(name)
    assert done.code == 130
    assert done.out == ""
    assert done.err.startswith("interrupted: ") and len(done.err.splitlines()) == 1


def test_trainer_warns_of_nothing_and_prints_the_perplexity_of_the_merged_model(
    run_example: RunExample, base_cache: Path, tmp_path: Path
):
    """A warning is an error here. The loss was divided by one token too many for each block."""
    done = run_example(
        "trainer", "--short", "--every", 10, "--cache", base_cache, "--out", tmp_path
    )
    assert done.code == 0
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    _, _, data = base_and_data(*SHORT, base_cache)
    found = perplexity(lambda ids: merged(ids).logits, data.held_out)
    (printed,) = re.findall(r"held-out perplexity (\d+\.\d+)", done.out)
    assert float(printed) == pytest.approx(found, abs=0.02)


def test_the_benchmark_of_a_call_times_every_contender(run_example: RunExample):
    done = run_example("benchmark.overhead", "--short")
    assert done.code == 0
    printed = {line.split()[0] for line in done.out.splitlines()}
    assert {"plain", "peft", "call", "bind", "bound", "call/peft"} <= printed
    assert "at most 1: not judged" in done.out


def test_the_benchmark_of_16_bits_times_each_dtype(run_example: RunExample):
    done = run_example("benchmark.sixteen_bit", "--short")
    assert done.code == 0
    printed = {tuple(line.split()[:2]) for line in done.out.splitlines()[1:]}
    dtypes = ("float32", "bfloat16", "float16")
    assert {(how, of) for how in ("random", "projection") for of in dtypes} <= printed


def test_the_benchmark_of_a_gpu_goes_on_after_a_part_that_failed(
    run_example: RunExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(import_example("benchmark.cuda"), "resampling", fail)
    parts = ["gpt2-small,float32,resample", "gpt2-small,bfloat16,eager"]
    options = ["--device", "cpu", "--short", "--rounds", 1, "--out", tmp_path]
    done = run_example("benchmark.cuda", *options, "--parts", *parts)
    assert done.code
    first, failed, last = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert first["batch"] == "2x32"
    assert failed["error"] == "RuntimeError: out of memory"
    assert set(last["figures"]) == {"memory", "step", "forward+backward"}
    assert set(last["figures"]["step"]) == {"full", "peft", "rosa", "frozen"}
    table = (tmp_path / "table.md").read_text()
    assert "resample failed: RuntimeError: out of memory" in table
    assert table.count("not judged") == 4
    done = run_example("benchmark.cuda", *options, "--limit", 1e-9)
    assert not done.code and "left out, since --limit was over: gpt2-small" in done.out


@pytest.mark.parametrize("heard", [1, 2], ids=["while it starts processes", "when they run"])
def test_ddp_ends_all_its_processes_in_one_line_when_interrupted(base_cache: Path, heard: int):
    """Ctrl-C, which goes to the whole group of processes, was lost while they were started."""
    command = [sys.executable, "-u", "-m", "examples.ddp", "--short", "--cache", str(base_cache)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # in the processes that it starts too
    options: dict[str, Any] = {"env": unbuffered, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes, **options) as run:
        assert run.stdout is not None
        said = iter(run.stdout.readline, "")
        # First by the one that starts the others, just before it does, and then by one of them.
        for _ in range(heard):
            assert any(line.startswith("base model: cached in") for line in said)
        os.killpg(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=60)  # that is, until all have closed their output
    assert run.returncode == 130
    assert err.splitlines()[-1] == "interrupted: a base model that was finished stays cached"
    assert "Traceback" not in err and "leaked" not in err
    assert [path.name[:5] for path in base_cache.iterdir()] == ["base-"]


def test_own_data_tunes_a_model_that_transformers_loads(
    run_example: RunExample, base_cache: Path, tmp_path: Path
):
    file = tmp_path / "text.txt"
    file.write_text("To be is to do. To do is to be. Do be do be do. " * 100)
    options = ["--short", "--cache", base_cache, "--out", tmp_path / "out"]
    done = run_example("own_data", "--data", file, *options)
    assert done.code == 0
    before, after = map(float, re.findall(r"\d+\.\d+", done.out))
    assert after < before - 1.0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "tuned")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tuned").decode([0]) == "<|endoftext|>"
    state, _ = checkpoint.load(tmp_path / "out" / "state.safetensors")
    merged = rosa_func.merge(state)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tuned.named_parameters())
    file.write_text("To be is to do.")
    done = run_example("own_data", "--data", file, *options)
    assert done.code == 1
    assert done.err.endswith("has 0 blocks of 64 tokens: expected ten")


def test_classify_tunes_a_classifier_that_transformers_loads(
    run_example: RunExample, base_cache: Path, tmp_path: Path
):
    file = tmp_path / "rows.tsv"
    texts = {"good": "I like it, and it is good", "bad": "That was a waste of my time"}
    rows = [f"{label}\t{texts[label]} {i}" for i in range(50) for label in texts]
    file.write_text("\n".join(rows))
    options = ["--short", "--cache", base_cache, "--out", tmp_path / "out"]
    done = run_example("classify", "--data", file, *options)
    assert done.code == 0
    assert "accuracy on 10 held-out rows: " in done.out
    assert ", 1.00 after" in done.out
    folder = tmp_path / "out" / "tuned"
    tuned = AutoModelForSequenceClassification.from_pretrained(folder)
    said = pipeline("text-classification", tuned, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert [said(texts[label])[0]["label"] for label in texts] == ["good", "bad"]
    for lines, complaint in (
        (["no tab"], "expected lines of a label, a tab and a text, got ['no tab']"),
        (rows[:1], "expected two classes and ten rows, got ['good'] and 1 rows"),
    ):
        file.write_text("\n".join(lines))
        done = run_example("classify", "--data", file, *options)
        assert done.code == 1
        assert done.err.endswith(complaint)


def test_the_members_of_the_ensemble_differ_and_their_mean_is_better_than_they_are_on_average(
    run_example: RunExample, base_cache: Path
):
    done = run_example("ensemble", "--short", "--cache", base_cache)
    assert done.code == 0
    *members, mean = map(float, re.findall(r"ppl (\d+\.\d+)", done.out))
    assert len(set(members)) == 3
    # The loss is the logarithm, and Jensen's inequality is strict where they differ.
    assert math.log(mean) < sum(map(math.log, members)) / 3
    _, model, data = base_and_data(*SHORT, base_cache)
    assert max(members) < perplexity(lambda ids: model(ids).logits, data.held_out) - 10


@pytest.mark.parametrize("script", ["own_data", "classify"])
def test_examples_refuse_data_that_are_not_there(run_example: RunExample, script: str):
    done = run_example(script, "--data", "absent.txt")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("argument --data: there is no file absent.txt")


@pytest.mark.parametrize(
    "script",
    [
        *("quickstart --out", "quickstart --cache", "trainer --out", "trainer --cache"),
        *("ddp --cache", "own_data --out", "classify --out", "ensemble --cache"),
    ],
)
def test_examples_refuse_a_file_where_a_folder_is_expected(run_example: RunExample, script: str):
    done = run_example(*script.split(), __file__)
    assert done.code == 2
    assert f"expected a folder, and {__file__} is a file" in done.err.splitlines()[-1]


def test_quickstart_compares_with_one_draw_and_says_what_its_table_shows_and_what_is_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """The resampled ROSA stood alone and looked ahead; the last lines led nowhere."""
    base, budget = Base(1, 16, 1, 300, 64, 2, 1), Budget(2, 8, 8, 2)
    import_example("quickstart").run(base, budget, tmp_path, tmp_path)
    curves = json.loads((tmp_path / "quickstart.json").read_text())
    resamples = {name: curve["resamples"] for name, curve in curves.items()}
    assert resamples == {"full": [], "lora": [], "one draw": [], "rosa": [1]}
    points = [curves[name]["points"] for name in ("one draw", "rosa")]
    assert points[0][:2] == points[1][:2]  # the first draw is the same
    assert points[0][2] != points[1][2]
    printed = capsys.readouterr().out
    assert all(f"\n{name:8}" in printed for name in curves)
    assert "one seed and a small model, so no ranking" in printed.replace("\n", " ")
    last = printed[printed.index("Next:") :]
    for name in re.findall(r"python -m examples\.(\w+)", last):
        assert import_example(name).main
    assert all((ROOT / path).is_file() for path in re.findall(r"\S+\.md", printed))


def test_the_figure_of_quickstart_has_plain_numbers_and_marks_its_resamples(tmp_path: Path):
    lines = {name: [(0, 340.0), (8, 180.0 - i)] for i, name in enumerate("abc")}
    resamples = {"a": [], "b": [], "c": [3, 5]}
    plot({n: Curve(1, 0.1, lines[n], resamples[n]) for n in lines}, "", tmp_path / "figure.png")
    axes = matplotlib.pyplot.gca()
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    shown = [label.get_text() for value, label in ticks if low <= value <= high]
    assert shown == ["200", "250", "300"]
    assert len(axes.get_yticks(minor=True)) == 0
    marks = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert marks == [3, 5]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["a", "b", "c", "resamples of c"]
    matplotlib.pyplot.close()


ROBUST = {
    "restarted": ["--rank", 2],
    "goes-on": ["--rank", 2, "--no-restart"],
    "resampled": ["--rank", 2, "--no-restart", "--resample-every", 3, "--moments", "project"],
    "sparse-only": ["--rank", 0, "--sparse-after", 0],
}


@pytest.mark.parametrize("how", ROBUST)
def test_finetune_robust_chooses_a_support_once_and_resumes_with_the_same_bits(
    run_example: RunExample,
    monkeypatch: pytest.MonkeyPatch,
    data_folder: Path,
    tmp_path: Path,
    how: str,
):
    """Stopped right before and after the step that chooses; with dropout, and two rates."""
    options = ["--method", "robust", "--density", 0.05, "--sparse-after", 2, "--score-batches", 2]
    options += ["--rate", 0.01, "--sparse-rate", 0.02, "--save-every", 1, "--steps", 5, "--dev", 4]
    start = options_of_a_step(data_folder, "none", *options, *ROBUST[how])
    run = import_example("finetune").Run
    begin_sparse, save, began = run.begin_sparse, run.save, []

    def begin_and_count(self: Any, batches: Any) -> None:
        began.append(self.step)
        begin_sparse(self, batches)

    def save_and_stop(self: Any, path: Path) -> None:
        save(self, path)
        if self.step == stop_at:
            raise SystemExit(stop_at)

    monkeypatch.setattr(run, "begin_sparse", begin_and_count)
    monkeypatch.setattr(run, "save", save_and_stop)
    results = []
    for stop_at in (0, 2, 3):
        out = tmp_path / str(stop_at)
        assert run_example(*start, "--out", out).code == stop_at
        kept, stop_at = stop_at, 0
        assert not kept or run_example(*start, "--out", out, "--resume").code == 0
        (file,) = out.glob("*.safetensors")
        state, extra = checkpoint.load(file)
        assert state["fixed", "transformer.h.0.mlp.c_fc.weight", "support"].shape == (51,)
        assert state["trainable", "transformer.h.0.mlp.c_fc.weight", "values"].any()
        assert [group["peak"] for group in extra["optimizer"]["param_groups"]] == [0.01, 0.01, 0.02]
        results.append((state_bytes(state), checkpoint.digest(extra["best"]["weights"])))
    assert results == results[:1] * 3
    assert began == [0 if how == "sparse-only" else 2] * 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--rank 0 --method rosa", "argument --rank: 0"),
        ("--rank 0 --method robust", "argument --sparse-after: with --rank 0"),
        ("--steps 64 --method robust", "argument --sparse-after: 64 leaves none of 64 steps"),
        ("--density 1.5", "argument --density: expected a number in (0, 1], got '1.5'"),
    ],
)
def test_finetune_refuses_options_that_leave_nothing_to_train(
    run_example: RunExample, options: str, complaint: str
):
    done = run_example("finetune", *options.split())
    assert done.code == 2
    assert complaint in done.err.splitlines()[-1]
