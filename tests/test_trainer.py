"""RosaModule in the transformers Trainer and in accelerate."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import rosa_func
from models import gpt2_and_rosa_module, seeded, tiny_gpt2, token_ids
from references import relative_distance, state_bytes
from rosa_func import keys, optim, sparse
from rosa_func.module import RosaModule
from rosa_func.trainer import ResampleCallback, RobustCallback


@pytest.mark.filterwarnings("ignore")  # about accelerate's own use of torch
def test_accelerate_trains_a_rosa_module_as_a_plain_loop_does():
    def train(accelerated: bool) -> dict[Any, Any]:
        _, module = gpt2_and_rosa_module()
        optimizer: Any = torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.0)
        backward: Any = Tensor.backward
        prepared = module
        if accelerated:
            accelerator = Accelerator(cpu=True)
            prepared, optimizer = accelerator.prepare(module, optimizer)
            backward = accelerator.backward
        for step in range(6):
            if step == 3:
                module.resample(step, optimizer=optimizer, moments="project")
            optimizer.zero_grad()
            backward(prepared(token_ids(2, 8, seed=step)).logits.square().mean())
            optimizer.step()
        return state_bytes(module.state.detach())

    assert train(accelerated=True) == train(accelerated=False)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class StopAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.filterwarnings("ignore")  # about Trainer's own use of torch
class TestTrainer:
    def run(
        self, folder: Path, every: int | None, *callbacks: TrainerCallback, resume: bool = False
    ) -> tuple[RosaModule, Trainer]:
        _, module = gpt2_and_rosa_module()
        data = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            num_train_epochs=4,
            learning_rate=0.01,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        resampling = ResampleCallback(every, moments="project")
        trainer = Trainer(module, arguments, train_dataset=data, callbacks=[resampling, *callbacks])  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return module, trainer

    # Inside an epoch of 2 steps or a cycle of 3, and right before a resample.
    @pytest.mark.parametrize(("every", "at"), [(3, 2), (3, 3), (None, 3), (None, 4)])
    def test_trainer_learns_resamples_and_resumes_with_the_same_bits(
        self, tmp_path: Path, every: int | None, at: int
    ):
        draws: list[int] = []

        class Counted(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                R = kwargs["model"].state["frozen", "transformer.wte.weight"]
                draws.append(hash(R.numpy().tobytes()))

        whole, trainer = self.run(tmp_path / "whole", every, Counted())
        assert len(draws) == 8
        # Every 3 of 8 steps, or each of 4 epochs of 2 steps.
        starts = [step for step in range(1, 8) if draws[step] != draws[step - 1]]
        assert starts == ([3, 6] if every else [2, 4, 6])
        untrained = Trainer(
            gpt2_and_rosa_module()[1], trainer.args, eval_dataset=trainer.train_dataset
        )
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < (
            untrained.evaluate()["eval_loss"] - 0.1
        )
        self.run(tmp_path / "parts", every, StopAtStep(at))
        parts, _ = self.run(tmp_path / "parts", every, resume=True)
        assert state_bytes(parts.state.detach()) == state_bytes(whole.state.detach())

    def test_the_resample_callback_refuses_wrong_arguments(self, tmp_path: Path):
        with pytest.raises(ValueError, match="positive number of steps, got 0"):
            ResampleCallback(0)
        for wrong in (2.5, True, "10"):
            with pytest.raises(TypeError, match=rf"every is None or an int, got {wrong!r}"):
                ResampleCallback(wrong)
        with pytest.raises(ValueError, match=r"moments is one of .*, got 'foo'"):
            ResampleCallback(moments="foo")
        with pytest.raises(ValueError, match="fraction=None with moments='prune'"):
            ResampleCallback(moments="prune")
        with pytest.raises(TypeError, match="got 'lora'"):
            ResampleCallback(sampler="lora")
        with pytest.raises(TypeError, match="is to be a RosaModule, got Linear"):
            ResampleCallback(3).on_train_begin(None, None, None, model=nn.Linear(2, 2))
        noisy = TrainingArguments(str(tmp_path), neftune_noise_alpha=5.0, report_to="none")
        _, module = gpt2_and_rosa_module()
        with pytest.raises(ValueError, match=r"neftune_noise_alpha=5\.0 hooks a copy"):
            ResampleCallback(3).on_train_begin(noisy, None, None, model=module)

    def arguments(self, folder: Path, **options: Any) -> TrainingArguments:
        common: Any = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        common |= {"save_strategy": "no", "learning_rate": 0.01, "num_train_epochs": 2}
        return TrainingArguments(str(folder), **common, **options)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_trainer_computes_the_loss_of_the_stock_model(self, tmp_path: Path, smoothing: float):
        """Labels were not shifted where they are smoothed: 3.553, stock 3.434."""
        data = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
        arguments = self.arguments(tmp_path, label_smoothing_factor=smoothing)
        one, other = (
            Trainer(used, arguments, eval_dataset=data).evaluate()["eval_loss"]  # type: ignore[arg-type]
            for used in gpt2_and_rosa_module()
        )
        assert one == pytest.approx(other, rel=1e-5)

    @pytest.mark.parametrize("reentrant", [None, False, True])
    def test_trainer_switches_gradient_checkpointing_on(
        self, tmp_path: Path, reentrant: bool | None
    ):
        """The docstring said not to; reentrant, frozen embeddings stopped every gradient."""
        options = None if reentrant is None else {"use_reentrant": reentrant}
        found = []
        for chosen in ({}, {"gradient_checkpointing": True}):
            model, module = gpt2_and_rosa_module(targets=["c_attn", "c_fc"])
            before = state_bytes(module.state)
            if chosen:
                chosen["gradient_checkpointing_kwargs"] = options
            data = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
            trainer = Trainer(module, self.arguments(tmp_path, **chosen), train_dataset=data)  # type: ignore[arg-type]
            trainer.train()
            assert module.is_gradient_checkpointing == bool(chosen)
            assert not model.is_gradient_checkpointing
            found.append(state_bytes(module.state))
            assert found[-1] != before
        assert found[0] == found[1]

    def test_what_trainer_saves_is_the_state_and_the_callback_says_what_to_call(
        self, tmp_path: Path
    ):
        """`from_pretrained` of it failed without a hint."""
        handler = Lines()
        logger = logging.getLogger("rosa_func.trainer")
        logger.addHandler(handler)
        logger.warning_once.cache_clear()  # type: ignore[attr-defined]
        try:
            module, trainer = self.run(tmp_path / "run", None)
        finally:
            logger.removeHandler(handler)
        assert [line for line in handler.lines if "save_pretrained(folder)" in line]
        trainer.save_model(str(tmp_path / "saved"))
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert saved.keys() == module.state_dict().keys()
        assert not (tmp_path / "saved" / "config.json").exists()
        module.save_pretrained(tmp_path / "merged")
        merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
        ids = token_ids(2, 8)
        assert relative_distance(merged(ids).logits, module.eval()(ids).logits) <= 1e-5


class AtSteps(TrainerCallback):
    """Keep the state after each step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(kwargs["model"].state.detach().clone())


AFTER = 3  # of 6 steps, inside an epoch of 2


@pytest.mark.filterwarnings("ignore")  # about Trainer's own use of torch
class TestRobustCallback:
    def run(
        self,
        folder: Path,
        *callbacks: TrainerCallback,
        robust: bool = True,
        restart: bool = False,
        resume: bool = False,
        loss: Any = None,
        last: TrainerCallback | None = None,
        save_strategy: str = "no",
        **options: Any,
    ) -> tuple[Any, RosaModule, Trainer]:
        """Train 6 steps; return the state that the module was made of, and the module."""
        model = seeded(lambda: tiny_gpt2(dropout=0.1))
        start = rosa_func.init(model, 2, targets=["wte", "c_attn", "c_fc"], train="ln_f")
        start = sparse.add(start, sparse.support_random(start, 0.05, key=0))
        module = RosaModule(model, start)
        data = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
        common: Any = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        common |= {"save_strategy": save_strategy, "save_steps": 1, "num_train_epochs": 3}
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=4, learning_rate=0.01, **common, **options
        )
        groups = optim.groups(module.state, values={"lr": 0.003})
        trainer = Trainer(
            module,  # type: ignore[arg-type]
            arguments,
            train_dataset=data,  # type: ignore[arg-type]
            callbacks=list(callbacks),
            optimizers=(torch.optim.AdamW(groups, 0.01, weight_decay=0.0), None),
        )
        if robust:
            chosen = start if restart else None
            loss = loss and getattr(trainer, loss)
            trainer.add_callback(RobustCallback(AFTER, batches=2, start=chosen, loss=loss))
        if last:
            trainer.add_callback(last)
        trainer.train(resume_from_checkpoint=resume)
        return start, module, trainer

    @pytest.mark.parametrize(
        ("restart", "every", "at"), [(False, 2, 2), (False, 2, 3), (True, 2, 3), (True, None, 4)]
    )
    def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(
        self, tmp_path: Path, restart: bool, every: int | None, at: int
    ):
        """Before the support is chosen, right before, and after; resampled, with dropout."""

        def resampling() -> ResampleCallback:
            return ResampleCallback(every, moments="project")

        _, whole, _ = self.run(tmp_path / "whole", resampling(), restart=restart)
        stop = StopAtStep(at)
        self.run(tmp_path / "parts", resampling(), stop, restart=restart, save_strategy="steps")
        _, parts, _ = self.run(tmp_path / "parts", resampling(), restart=restart, resume=True)
        assert state_bytes(parts.state.detach()) == state_bytes(whole.state.detach())

    @pytest.mark.parametrize("loss", [None, "compute_loss"])
    def test_the_support_is_chosen_once_by_gradients_of_the_rows_after_the_first_steps(
        self, tmp_path: Path, loss: str | None
    ):
        """Dropout is on, and draws from the key: the global random state stays as it is."""
        at, states = AtSteps(), []

        class AtBegin(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                states.append(torch.get_rng_state())

        before, after = AtBegin(), AtBegin()
        start, _, trainer = self.run(
            tmp_path, at, before, last=after, loss=loss, label_smoothing_factor=0.5 if loss else 0.0
        )
        assert all(map(torch.equal, states[::2], states[1::2]))
        sizes = {name: len(v["support"]) for name, v in start["fixed"].items()}
        for place, state in enumerate(at.states):
            values = [v for k, v in state["trainable"].items(True, True) if k[-1] == "values"]
            assert len(values) == len(sizes) == 5
            assert all(v.any() == (place >= AFTER) for v in values)
            reference = start if place < AFTER else at.states[-1]
            assert state_bytes(state["fixed"]) == state_bytes(reference["fixed"])
        order = torch.randperm(8, generator=keys.generator(0, "scores", "rows"))
        rows = token_ids(8, 8)
        batches = [{"input_ids": rows[i], "labels": rows[i]} for i in order.split(4)]
        of_trainer = trainer.compute_loss if loss else (lambda m, batch: m(**batch).loss)
        model = seeded(lambda: tiny_gpt2(dropout=0.1))
        scores = seeded(
            lambda: sparse.scores(model, at.states[AFTER - 1], batches, of_trainer),
            rosa_func.fold_in(0, "scores"),
        )
        expected = sparse.support(scores, 0.05)
        for name, places in expected.items():
            assert torch.equal(at.states[-1]["fixed", name, "support"], places)

    def test_the_first_steps_are_those_of_the_factors_alone(self, tmp_path: Path):
        """Clipping counts gradients, and the values' would have made the steps smaller."""
        at, alone = AtSteps(), AtSteps()
        self.run(tmp_path / "robust", at, max_grad_norm=1e-3)

        class Frozen(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                optim.groups(kwargs["model"].state, values=None)

        self.run(tmp_path / "alone", alone, Frozen(), robust=False, max_grad_norm=1e-3)
        for one, other in zip(at.states[:AFTER], alone.states, strict=False):
            for name, tensor in other["trainable"].items(True, True):
                assert relative_distance(one["trainable"][name], tensor) <= 1e-6, name

    def test_a_restart_begins_with_the_first_weights_and_a_fresh_optimizer(self, tmp_path: Path):
        taken: list[Any] = []

        class AtBegin(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                kwargs["model"].register_forward_pre_hook(
                    lambda module, _: taken.append(module.state.detach().clone())
                )

        start, module, trainer = self.run(tmp_path, AtBegin(), restart=True)
        assert state_bytes(taken[AFTER]["trainable"]) == state_bytes(start["trainable"].detach())
        assert state_bytes(taken[AFTER]["frozen"]) == state_bytes(start["frozen"])
        steps = {int(trainer.optimizer.state[leaf]["step"]) for leaf in module.parameters()}
        assert steps == {6 - AFTER}

    def test_without_a_restart_the_factors_keep_their_moments(self, tmp_path: Path):
        _, module, trainer = self.run(tmp_path)
        for name, leaf in module.named_parameters():
            step = int(trainer.optimizer.state[leaf]["step"])
            assert step == (6 - AFTER if name.endswith("values") else 6)

    def test_wrong_arguments_are_refused(self, tmp_path: Path):
        for wrong in (-1, 0):
            with pytest.raises(ValueError, match=f"batches is at least 1, got {wrong}"):
                RobustCallback(batches=wrong)
        with pytest.raises(ValueError, match="after is at least 0, got -1"):
            RobustCallback(-1)
        with pytest.raises(TypeError, match=r"after is an int, got 2\.5 of type float"):
            RobustCallback(2.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="how is one of mean_square, mean_abs, got 'sum'"):
            RobustCallback(how="sum")
        with pytest.raises(TypeError, match="is to be a RosaModule, got Linear"):
            RobustCallback().on_train_begin(None, None, None, model=nn.Linear(2, 2))
        _, plain = gpt2_and_rosa_module()
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
        data: Any = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
        with pytest.raises(ValueError, match="needs a RosaModule whose state has a sparse part"):
            Trainer(plain, arguments, train_dataset=data, callbacks=[RobustCallback()]).train()  # type: ignore[arg-type]
        start, _, _ = self.run(tmp_path / "few", robust=False, max_steps=1)
        module = RosaModule(seeded(tiny_gpt2), start)
        with pytest.raises(ValueError, match=r"batches=4 of 8 rows are 32 rows .* set has 8"):
            Trainer(module, arguments, train_dataset=data, callbacks=[RobustCallback()]).train()  # type: ignore[arg-type]
