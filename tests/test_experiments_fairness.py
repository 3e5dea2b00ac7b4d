"""What each method is given and what is reported: rates, batches, moments, rows and scores."""

import io
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.experiments import adapting, plan, runner, task, tasks, training
from examples.experiments import tiny as small
from small_experiment import METHODS, RATES, SETTING, RecordingTask, experiment

RATE = 1e-2
USUAL = [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]  # of the rate, in the seven steps of SETTING
REWARMED = [0.5, 1.0, 1.0, 0.8 / 3, 0.6 * 2 / 3, 0.4, 0.2 / 3]  # resamples before steps 3 and 6
GLUE = {"model": "tiny:bert", "length": 32, "rows": {"train": 30}, "batch": 4}
TEXT = {"model": "tiny:llama", "length": 64, "rows": {"train": 20, "dev": 4, "test": 4}, "batch": 4}
TASKS = {"glue/CoLA": GLUE, "glue/STS-B": GLUE, "e2e": TEXT, "eli5": TEXT}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tiny data sets and models."""
    folder = tmp_path_factory.mktemp("data")
    small.make(folder)
    return folder


def cell_of(method: plan.Method, **setting: Any) -> plan.Cell:
    return plan.Cell({**SETTING, **setting}, method, RATE, 3, "final")


def loaded(name: str, data: Path) -> task.Task:
    return tasks.load({"task": name, **TASKS[name]}, 3, data, data)


@pytest.fixture
def steps() -> Iterator[list[list[dict[str, Any]]]]:
    """Return the optimizer's groups at each step; `zero` tells whether all their leaves are 0."""
    seen: list[list[dict[str, Any]]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        zero = [not any(bool(p.any()) for p in g["params"]) for g in optimizer.param_groups]
        groups = zip(optimizer.param_groups, zero, strict=True)
        seen.append([{"lr": g["lr"], "decay": g["weight_decay"], "zero": z} for g, z in groups])

    hook = register_optimizer_step_pre_hook(note)
    yield seen
    hook.remove()


class TestSteps:
    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_the_optimizer_steps_at_the_rates_of_the_one_schedule(self, steps, method):
        list(training.run(cell_of(method), RecordingTask().load))
        expected = [RATE * part for part in (REWARMED if method.rewarm else USUAL)]
        assert all(len({group["lr"] for group in groups}) == 1 for groups in steps)
        assert [groups[0]["lr"] for groups in steps] == pytest.approx(expected)

    def test_a_ratio_is_the_output_sides_rate_over_that_of_the_input_side(self, steps):
        list(training.run(cell_of(METHODS[1]._replace(ratio=4.0)), RecordingTask().load))
        rates = {
            group["zero"]: group["lr"] for group in steps[0]
        }  # LoRA's output side starts at zero
        assert rates == pytest.approx({False: RATE / 2, True: 4 * RATE / 2})

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_no_method_has_weight_decay(self, steps, method):
        list(training.run(cell_of(method), RecordingTask().load))
        assert {group["decay"] for groups in steps for group in groups} == {0.0}

    @pytest.mark.parametrize("moments", ["reset", "keep", "project", "prune"])
    def test_a_resample_does_to_the_moments_what_the_method_says(self, moments):
        made = RecordingTask().load()
        run = adapting.Adaptation(made, cell_of(METHODS[2]._replace(moments=moments)))
        batches = made.batches(0)
        for _ in range(3):
            run.train(next(batches), RATE)

        def averages() -> list[Tensor | None]:
            leaves = [p for group in run.optimizer.param_groups for p in group["params"]]
            return [run.optimizer.state[leaf].get("exp_avg") for leaf in leaves]

        before = [m.clone() for m in averages() if m is not None]
        run.resample(3)
        after = averages()
        if moments == "reset":
            assert after == [None] * len(before)
            return
        same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert same == [moments == "keep"] * len(before)
        kept = [int(m.count_nonzero()) / m.numel() for m in after if m is not None]
        assert all(part <= 0.25 if moments == "prune" else part > 0.9 for part in kept)


class TestWhatIsKept:
    @pytest.fixture
    def ended(self) -> dict[str, Any]:
        """Return the end of a run whose second of four evaluations is the best."""
        made, outputs = RecordingTask().load(), []
        losses = iter([3.0, 1.0, 2.0, 4.0, 0.0])  # the last is of test

        def evaluate(forward: task.Forward, _: str) -> task.Metrics:
            outputs.append(forward(torch.ones(1, 6)).detach())
            return {"loss": next(losses)}

        def generate(model: torch.nn.Module) -> task.Metrics:
            return {"output": model(torch.ones(1, 6)).detach()}

        new = made._replace(evaluate=evaluate, generate=generate)
        *_, end = training.run(cell_of(METHODS[2]), lambda: new)
        return {**end, "outputs": outputs}

    def test_a_run_is_worth_its_best_loss_on_dev_not_its_last(self, ended):
        assert ended["best"] == 1.0

    def test_text_is_generated_by_the_best_weights_merged(self, ended):
        first, best, _, last, _ = ended["outputs"]
        written = ended["generated"]["output"]
        assert torch.allclose(written, best, atol=1e-5)
        assert not torch.allclose(written, first, atol=1e-3)
        assert not torch.allclose(written, last, atol=1e-3)


class TestData:
    @pytest.mark.parametrize("name", ["glue/CoLA", "e2e"])
    def test_methods_of_one_seed_train_on_equal_batches(self, data, name):
        def trained(method: plan.Method) -> list[Tensor]:
            made, seen = loaded(name, data), []

            def loss(forward: task.Forward, batch: dict[str, Tensor]) -> Tensor:
                seen.append(batch["input_ids"])
                return made.loss(forward, batch)

            list(training.run(cell_of(method), lambda: made._replace(loss=loss)))
            return seen

        first, *others = [trained(method) for method in METHODS[:3]]
        assert len(first) == 7
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    @pytest.mark.parametrize("name", TASKS)
    def test_the_order_of_batches_depends_on_the_seed_alone(self, data, name):
        made = loaded(name, data)

        def drawn(seed: int, globally: int) -> list[list[list[int]]]:
            state = random.getstate()
            with torch.random.fork_rng(devices=[]):
                random.seed(globally)
                torch.manual_seed(globally)
                taken = islice(made.batches(seed), 15)  # more than two epochs
                rows = [batch["input_ids"].tolist() for batch in taken]
            random.setstate(state)
            return rows

        assert drawn(5, globally=0) == drawn(5, globally=1)
        assert drawn(5, globally=0) != drawn(6, globally=0)

    def test_the_dev_tenth_of_glue_is_a_fixed_sample(self, data):
        """The first rows of a file may be of one source or of one label."""
        content = (data / "glue" / "CoLA" / "train.jsonl").read_text(encoding="utf-8")
        sentences = [json.loads(line)["sentence"] for line in content.splitlines()]
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
        tokenizer = AutoTokenizer.from_pretrained(data / "bert")
        expected = tokenizer([sentences[i] for i in order[:3].tolist()])["input_ids"]
        seen: list[list[int]] = []

        def forward(**batch: Tensor) -> Any:
            rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
            seen.extend(ids[kept].tolist() for ids, kept in rows)
            return type("Output", (), {"logits": torch.zeros(len(batch["input_ids"]), 2)})

        for seed in (0, 1):
            seen.clear()
            tasks.load({"task": "glue/CoLA", **GLUE}, seed, data, data).evaluate(forward, "dev")
            assert sorted(seen) == sorted(expected)

    @pytest.mark.parametrize("name", ["CoLA", "STS-B"])
    def test_the_loss_of_glue_is_the_mean_over_its_rows(self, data, name):
        """The first word of a row decides its logits: (word / 10, 0), or the grade word / 10."""
        graded, made = name == "STS-B", loaded(f"glue/{name}", data)
        content = (data / "glue" / name / "dev.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in content.splitlines()]
        texts = [row["sentence1" if graded else "sentence"] for row in rows]
        words = AutoTokenizer.from_pretrained(data / "bert")(texts, padding=True)["input_ids"]

        def logits(ids: Tensor) -> Tensor:
            word = ids[:, 1:2] / 10
            return word if graded else torch.cat([word, torch.zeros_like(word)], 1)

        def forward(**batch: Tensor) -> Any:
            return type("Output", (), {"logits": logits(batch["input_ids"])})

        def expected(ids: Tensor, labels: Tensor) -> float:
            if graded:
                return (labels - logits(ids)[:, 0]).square().mean().item()
            chosen = logits(ids).log_softmax(1).gather(1, labels.long()[:, None])
            return -chosen.mean().item()

        batch, labels = next(made.batches(0)), torch.tensor([row["label"] for row in rows])
        of_batch = expected(batch["input_ids"], batch["labels"])
        assert made.loss(forward, batch).item() == pytest.approx(of_batch)
        of_dev = expected(torch.tensor(words), labels)
        assert made.evaluate(forward, "test")["loss"] == pytest.approx(of_dev, rel=1e-5)


class ProcessesThatRunAtOnce:
    """Stands in for multiprocessing's context: a process runs to its end when it is started."""

    Value = staticmethod(multiprocessing.Value)

    def set_forkserver_preload(self, _: list[str]) -> None:
        pass

    class Process:
        exitcode, sentinel = 0, 0

        def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
            self.start = lambda: target(*args)

        def join(self) -> None:
            pass


def finish(cell: plan.Cell, _: Any, __: Any, folder: Path, steps: Any, ___: int) -> None:
    """Write the lines of a cell that took its steps; its loss is least at the third rate."""
    steps.value += cell.steps
    end = {"event": "end", "best": abs(cell.rate - RATES[2]), "seconds": 1.0}
    lines = [{"cell": cell.key, "event": "start"}, {"cell": cell.key, **end}]
    path = folder / f"{cell.key}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_progress_bar_knows_how_many_steps_are_to_go(tmp_path, monkeypatch):
    seen: list[tuple[int, int]] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, file=io.StringIO())

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            seen.append((self.n, self.total))

    monkeypatch.setattr(runner, "tqdm", Bar)
    monkeypatch.setattr(runner, "wait", lambda sentinels, timeout: sentinels)
    monkeypatch.setattr(runner, "_work", finish)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: ProcessesThatRunAtOnce())
    e = experiment(methods=METHODS[1:3], rounds=1)
    runner.run(e, None, tmp_path, tmp_path, jobs=1)
    searches, published, costs = 2 * 3 * 3, 2 * 2 * 7, 3 * plan.COST_STEPS  # full among the costs
    before = [total for done, total in seen if done < searches + published]
    assert before and set(before) == {searches + published}  # the costs are not yet due
    assert seen[-1] == (searches + published + costs,) * 2
