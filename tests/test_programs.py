"""Whole programs, as a reader of the README and the guide writes them: they give what is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import rosa_func
from models import seeded
from rosa_func.module import RosaModule
from rosa_func.trainer import ResampleCallback

VOCABULARY, LENGTH, CLASSES = 16, 8, 4
CONFIG = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
CONFIG |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}


def new_model() -> GPT2LMHeadModel:
    """Return a language model that has learned nothing yet, in eval mode."""
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**CONFIG))).eval()


def counting(batches: int, seed: int) -> list[Tensor]:
    """Return batches of eight rows that count, each from a start of its own."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCABULARY, (batches, 8, 1), generator=generator)
    return list((starts + torch.arange(LENGTH)) % VOCABULARY)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loss_of(model: nn.Module, state: TensorDict, ids: Tensor) -> Tensor:
    return next_token_loss(rosa_func.call(model, state, ids, use_cache=False).logits, ids)


def adamw(state: TensorDict, rate: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(rosa_func.parameters(state), lr=rate, weight_decay=0.0)


def test_a_loop_that_resamples_evaluates_resumes_merges_and_generates(tmp_path: Path):
    model, file = new_model(), tmp_path / "run.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, dev = counting(60, seed=1), counting(1, seed=2)[0]

    def evaluate(state: TensorDict) -> float:
        with torch.no_grad():
            return loss_of(model, state, dev).item()

    def run(state: TensorDict, optimizer: torch.optim.Optimizer, steps: range) -> TensorDict:
        for step in steps:
            if step and step % 20 == 0:
                new = rosa_func.resample(state, key=step)
                assert evaluate(new) == pytest.approx(evaluate(state), abs=1e-4)
                rosa_func.optim.rebind(optimizer, state, new)
                state = new
            optimizer.zero_grad()
            loss_of(model, state, train[step]).backward()
            optimizer.step()
        return state

    state = rosa_func.init(model, r=2, key=0)
    losses = [evaluate(state)]
    optimizer = adamw(state, 3e-2)
    state = run(state, optimizer, range(30))  # the first resample is at 20, the second at 40
    losses.append(evaluate(state))
    rosa_func.checkpoint.save(file, state, optimizer=optimizer.state_dict(), step=30)
    whole = run(state, optimizer, range(30, 60))
    losses.append(evaluate(whole))
    assert losses[0] > losses[1] + 0.5 > losses[2] + 1.0

    resumed, extra = rosa_func.checkpoint.load(file)
    optimizer = adamw(resumed, 3e-2)
    optimizer.load_state_dict(extra["optimizer"])
    resumed = run(resumed, optimizer, range(extra["step"], 60))
    assert rosa_func.checkpoint.digest(resumed) == rosa_func.checkpoint.digest(whole)

    # A cycle changes a weight by at most rank 2 r = 4, and three cycles by 12.
    weight = "transformer.h.0.mlp.c_fc.weight"
    change = rosa_func.merge(whole)[weight] - before[weight]
    assert 4 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 12

    rosa_func.export.to_module(model, whole).save_pretrained(tmp_path / "tuned")
    tuned = GPT2LMHeadModel.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        own = rosa_func.call(model, whole, dev).logits
        torch.testing.assert_close(tuned(dev).logits, own, rtol=1e-4, atol=1e-4)
    prompt = torch.tensor([[3, 4, 5], [9, 10, 11]])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    options["attention_mask"] = torch.ones_like(prompt)
    written = tuned.generate(prompt, **options)
    assert written.tolist() == [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    assert torch.equal(rosa_func.adapted(model, whole).generate(prompt, **options), written)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_classifier_whose_head_trains_in_full_and_its_backbone_by_factors(tmp_path: Path):
    config = GPT2Config(**CONFIG, num_labels=CLASSES, pad_token_id=0)
    model = seeded(lambda: GPT2ForSequenceClassification(config)).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (100, 32, LENGTH), generator=generator)
    labels = ids[:, :, 0] % CLASSES  # the class is in the first token, the head reads the last
    dev_ids, dev_labels = ids[90:].flatten(0, 1), labels[90:].flatten()

    def train(state: TensorDict) -> float:
        optimizer = adamw(state, 2e-2)
        for batch, classes in zip(ids[:90], labels[:90], strict=True):
            optimizer.zero_grad()
            F.cross_entropy(rosa_func.call(model, state, batch).logits, classes).backward()
            optimizer.step()
        with torch.no_grad():
            logits = rosa_func.call(model, state, dev_ids).logits
        return (logits.argmax(-1) == dev_labels).double().mean().item()

    with pytest.warns(UserWarning, match="head"):  # of a head that would stay as it was drawn
        rosa_func.init(model, r=4)
    state = rosa_func.init(model, r=4, train="head")
    head = state["trainable", "score.weight"].clone()
    assert head.shape == (CLASSES, 32)
    assert set(state["trainable", "transformer.h.0.attn.c_attn.weight"].keys()) == {"A", "B"}
    assert rosa_func.count(state).weights["score.weight"] == (head.numel(), head.numel())

    head_alone = train(rosa_func.init(model, r=4, targets=[], train="head"))
    assert head_alone < 0.6 < 0.9 < train(state)
    assert not torch.equal(state["trainable", "score.weight"], head)

    rosa_func.export.to_module(model, state).save_pretrained(tmp_path)
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        own = rosa_func.call(model, state, dev_ids).logits
        torch.testing.assert_close(loaded(dev_ids).logits, own, rtol=1e-4, atol=1e-4)


def test_trainer_resamples_and_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path):
    def labelled(ids: Tensor) -> dict[str, Tensor]:  # no token comes before the first
        return {"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])}

    rows = [labelled(row) for batch in counting(16, seed=1) for row in batch]

    def trainer(folder: str) -> Trainer:
        model = new_model()
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=8,
            max_steps=24,
            learning_rate=3e-2,
            save_steps=12,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return Trainer(
            RosaModule(model, rosa_func.init(model, r=4)),
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:32],
            callbacks=[ResampleCallback(every=8)],
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    first = whole.evaluate()["eval_loss"]
    whole.train()
    last = whole.evaluate()["eval_loss"]
    assert last < first - 0.5

    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    digests = [rosa_func.checkpoint.digest(each.model.state) for each in (whole, resumed)]
    assert digests[0] == digests[1]

    whole.model.save_pretrained(tmp_path / "merged")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    ids = torch.stack([row["input_ids"] for row in rows[:32]])
    with torch.no_grad():
        assert next_token_loss(loaded(ids).logits, ids).item() == pytest.approx(last, abs=1e-4)


def test_gradients_of_single_samples_by_vmap_equal_those_of_a_loop():
    model, ids = new_model(), counting(1, seed=2)[0]
    model.set_attn_implementation("eager")
    state = rosa_func.init(model, r=4)

    def of_one(trainable: TensorDict, row: Tensor) -> Tensor:
        return loss_of(model, state.replace(trainable=trainable), row.unsqueeze(0))

    by_vmap = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(state["trainable"], ids)
    rosa_func.parameters(state)
    for i, row in enumerate(ids):
        loss_of(model, state, row.unsqueeze(0)).backward()
        for name in state["trainable"].keys():
            for factor in ("A", "B"):
                leaf = state["trainable", name, factor]
                assert leaf.grad.abs().max() > 1e-4
                torch.testing.assert_close(
                    by_vmap[name, factor][i], leaf.grad, rtol=1e-3, atol=1e-5
                )
                leaf.grad = None


def test_an_ensemble_of_states_trained_by_vmap_equals_its_members_trained_alone():
    model, batches, dev = new_model(), counting(10, seed=1), counting(1, seed=2)[0]
    model.set_attn_implementation("eager")

    def logits(state: TensorDict) -> Tensor:
        return rosa_func.call(model, state, dev, use_cache=False).logits

    def loss(state: TensorDict, ids: Tensor) -> Tensor:
        return loss_of(model, state, ids)

    members = [rosa_func.init(model, r=2, key=key) for key in range(3)]
    first = loss(members[0], dev).item()
    stacked = torch.stack(members)
    # Not AdamW: where a gradient is near 0, its steps have the size of the rate and a sign that
    # rounding decides.
    optimizer = torch.optim.SGD(rosa_func.parameters(stacked), lr=0.3)
    for ids in batches:
        optimizer.zero_grad()
        torch.func.vmap(loss, in_dims=(0, None))(stacked, ids).sum().backward()
        optimizer.step()
    for member in members:
        optimizer = torch.optim.SGD(rosa_func.parameters(member), lr=0.3)
        for ids in batches:
            optimizer.zero_grad()
            loss(member, ids).backward()
            optimizer.step()

    with torch.no_grad():
        together = torch.func.vmap(logits)(stacked)
        alone = torch.stack([logits(member) for member in members])
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
        own = torch.stack([next_token_loss(each, dev) for each in together])
        assert own.max() < first - 0.3 and own.max() - own.min() > 1e-3
        mean = next_token_loss(together.softmax(-1).mean(0).log(), dev)
        assert mean < own.mean()  # by Jensen's inequality
    for state, member in zip(stacked.detach().unbind(0), members, strict=True):
        for name, weight in rosa_func.merge(state).items():
            torch.testing.assert_close(
                weight, rosa_func.merge(member.detach())[name], rtol=1e-3, atol=1e-4
            )


def test_a_sweep_over_ranks_and_rates_from_one_model():
    model, batches, dev = new_model(), counting(25, seed=1), counting(1, seed=2)[0]

    def train(rank: int, rate: float) -> tuple[int, float]:
        state = rosa_func.init(model, r=rank)
        optimizer = adamw(state, rate)
        for ids in batches:
            optimizer.zero_grad()
            loss_of(model, state, ids).backward()
            optimizer.step()
        with torch.no_grad():
            return rosa_func.count(state).trainable, loss_of(model, state, dev).item()

    ranks, rates = (1, 4, 16), (1e-4, 1e-2)
    results = {(rank, rate): train(rank, rate) for rank in ranks for rate in rates}
    values = {rank: results[rank, 1e-2][0] for rank in ranks}
    # Of c_attn 32 x 96, c_proj 32 x 32, c_fc 32 x 128 and c_proj 128 x 32.
    assert values == {rank: rank * (128 + 64 + 160 + 160) for rank in ranks}
    assert min(results, key=lambda run: results[run][1]) == (16, 1e-2)
    assert all(results[rank, 1e-2][1] < results[rank, 1e-4][1] for rank in ranks)
    assert results[4, 1e-2] == train(4, 1e-2)  # no run left a trace in the model, or in another
