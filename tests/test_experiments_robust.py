"""Robust adaptation in the harness: its support, its budget, its rates; runs that go on."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rosa_func
from examples.experiments import adapting, plan, records, resuming, task, training
from small_experiment import METHODS, SETTING, RecordingTask

RATE = 1e-2
ROBUST = [method for method in METHODS if method.budget]
BY_NAME = {method.name: method for method in METHODS}


def cell_of(method: plan.Method, **changes: Any) -> plan.Cell:
    return plan.Cell(SETTING, method, RATE, 3, "final")._replace(**changes)


def after(method: plan.Method, steps: int) -> tuple[task.Task, adapting.Adaptation]:
    """Return a run after some steps of its first cycle."""
    made = RecordingTask().load()
    run = adapting.Adaptation(made, cell_of(method))
    for batch in islice(made.batches(3), steps):
        run.train(batch, RATE)
    return made, run


def places(run: adapting.Adaptation) -> dict[str, list[int]]:
    fixed = run.state["fixed"]
    return {name: fixed[name]["support"].tolist() for name in fixed.keys()}


def largest(
    made: task.Task, weights: dict[str, Tensor], part: float, step: int
) -> dict[str, list[int]]:
    """Return the places of the largest mean squares of the gradients by dense weights."""
    batches = made.batches(adapting.draw_seed(3, step))
    sums = {name: torch.zeros(W.numel()) for name, W in weights.items() if W.ndim == 2}
    for batch in islice(batches, adapting.GRADIENT_BATCHES):
        leaves = {name: W.detach().requires_grad_() for name, W in weights.items()}
        made.loss(lambda x, of=leaves: functional_call(made.model, of, x), batch).backward()
        for name, total in sums.items():
            total += leaves[name].grad.flatten().square()
    ranked = {name: total.argsort(descending=True).tolist() for name, total in sums.items()}
    return {name: sorted(order[: round(part * len(order))]) for name, order in ranked.items()}


class TestSupport:
    def test_it_is_that_of_the_gradients_after_the_first_steps(self):
        for name in ("robust", "robust, restarted"):
            made, run = after(BY_NAME[name], 2)
            expected = largest(made, rosa_func.merge(run.state), 0.4, 2)  # 20 values of 50
            run.begin(2)
            assert places(run) == expected

    def test_sparse_only_has_the_support_of_the_first_weights(self):
        made, run = after(BY_NAME["sparse only"], 0)
        W = {name: p.detach() for name, p in made.model.named_parameters()}
        assert places(run) == largest(made, W, 0.8, 0)

    def test_a_restart_keeps_nothing_of_the_first_steps_but_the_support(self):
        _, first = after(BY_NAME["robust, restarted"], 0)
        factors = [p.detach().clone() for p in rosa_func.parameters(first.state)]
        _, run = after(BY_NAME["robust, restarted"], 2)
        run.begin(2)
        named = rosa_func.named_parameters(run.state)
        assert not any(v.any() for name, v in named.items() if name.endswith("values"))
        kept = [v for name, v in named.items() if not name.endswith("values")]
        assert all(torch.equal(a, b) for a, b in zip(kept, factors, strict=True))
        assert not run.optimizer.state

    def test_without_a_restart_factors_and_their_moments_go_on(self):
        _, run = after(BY_NAME["robust"], 2)
        before = {id(p): run.optimizer.state[p] for p in rosa_func.parameters(run.state)}
        run.begin(2)
        for name, leaf in rosa_func.named_parameters(run.state).items():
            assert (id(leaf) in before) == (not name.endswith("values"))
            if id(leaf) in before:
                assert run.optimizer.state[leaf] is before[id(leaf)]

    def test_a_random_support_is_another_and_depends_on_the_seed_alone(self):
        found = []
        for steps in (2, 0):
            _, run = after(BY_NAME["random support"], steps)
            run.begin(2)
            found.append(places(run))
        made, run = after(BY_NAME["random support"], 2)
        assert found[0] == found[1] != largest(made, rosa_func.merge(run.state), 0.4, 2)

    def test_a_resample_stays_on_the_support(self):
        _, run = after(BY_NAME["robust, resampled"], 2)
        run.begin(2)
        found = places(run)
        run.resample(3)
        assert places(run) == found


class TestBudget:
    def shaped(self, model: str) -> torch.nn.Module:
        """Return one layer of the shapes of a model of the files: the density is the same."""
        if model == "smollm2":
            shape = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 8}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape, **heads))
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=160, n_head=5, vocab_size=8))

    @pytest.mark.parametrize("name", ["robust-small", "robust-e2e", "robust-gsm8k"])
    def test_all_methods_of_a_file_but_full_train_as_many_values_within_a_hundredth(self, name):
        e = plan.load(name)
        model = self.shaped(e.setting["model"])
        values = {}
        for method in e.methods:
            if method.sampler != "full":
                anywhere = method.timed._replace(sampler="lora", support="random")
                made = RecordingTask().load()._replace(model=model)
                values[method.name] = adapting.Adaptation(made, cell_of(anywhere)).trainable
        assert len(values) >= 7
        for found in values.values():
            assert found == pytest.approx(values["LoRA"], rel=0.01)

    def test_a_budget_that_leaves_nothing_is_refused(self, tmp_path):
        source = (plan.SPECS / "robust-small.toml").read_text(encoding="utf-8")
        for old, new in (("budget = 4", "budget = 2"), ('support = "random"', 'support = "rand"')):
            (tmp_path / "x.toml").write_text(source.replace(old, new))
            with pytest.raises(SystemExit, match="'gradient' or 'random', the budget above"):
                plan.load("x", tmp_path)

    def test_the_values_have_a_rate_of_their_own(self):
        _, run = after(BY_NAME["robust"]._replace(values=0.29), 2)
        run.begin(2)
        run.train(torch.ones(8, 6), RATE)
        rates = {
            id(leaf): group["lr"]
            for group in run.optimizer.param_groups
            for leaf in group["params"]
        }
        for name, leaf in rosa_func.named_parameters(run.state).items():
            assert rates[id(leaf)] == RATE * (0.29 if name.endswith("values") else 1.0)


def stop_at(step: int) -> Callable[[], None]:
    """Return a tick that raises after so many steps."""
    left = iter(range(step))

    def tick() -> None:
        if next(left) == step - 1:
            raise KeyboardInterrupt

    return tick


def result(lines: list[records.Line]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class TestGoingOn:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resuming, "EVERY", 0.0)

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_a_run_that_was_stopped_ends_as_one_that_was_not(self, method, tmp_path):
        """Stopped after steps 4 and 7; checkpoints are written before steps 3 and 6."""
        cell, path = cell_of(method), tmp_path / "run.safetensors"
        whole = result(list(training.run(cell, RecordingTask().load)))
        for step in (4, 7):
            with pytest.raises(KeyboardInterrupt):
                list(training.run(cell, RecordingTask().load, stop_at(step), path))
            assert path.exists()
        seen, ticks = RecordingTask(), [0]
        found = list(training.run(cell, seen.load, lambda: ticks.append(1), path))
        assert result(found) == whole
        assert seen.splits == {"dev": 2, "test": 1}  # of four evaluations
        assert sum(ticks) == 7

    def test_a_checkpoint_of_other_data_or_another_machine_is_passed_over(self, tmp_path):
        cell, path = cell_of(BY_NAME["robust"]), tmp_path / "run.safetensors"
        with pytest.raises(KeyboardInterrupt):
            list(training.run(cell, RecordingTask().load, stop_at(4), path))
        seen = RecordingTask()
        list(training.run(cell, lambda: seen.load()._replace(digest="other"), lambda: None, path))
        assert seen.splits == {"dev": 4, "test": 1}

    def test_checkpoints_are_some_minutes_apart(self, tmp_path, monkeypatch):
        monkeypatch.setattr(resuming, "EVERY", 300.0)
        path: Path = tmp_path / "run.safetensors"
        list(training.run(cell_of(BY_NAME["robust"]), RecordingTask().load, lambda: None, path))
        assert not path.exists()


def test_a_run_of_no_steps_scores_the_first_weights():
    method = plan.Method("before training", "full", length=0)
    seen = RecordingTask()
    lines = list(training.run(cell_of(method), seen.load))
    model = seen.load().model
    loss = model(torch.ones(1, 6)).square().mean().item()
    assert lines[-1]["test"]["loss"] == pytest.approx(loss)
    assert lines[-1]["trainable"] == 0 and seen.splits == {"dev": 1, "test": 1}
    assert method.label == "before training"
