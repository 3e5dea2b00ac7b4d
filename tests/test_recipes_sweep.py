"""Recipes of stacked states: the losses of the loop, and the outputs of a pass for each adapter."""

import pytest
import torch

import rosa_func
from examples.recipes import adapters, counting, sweep
from references import perturbed, relative_distance
from rosa_func import samplers, stacking


@pytest.fixture(scope="module")
def model():
    return counting.counter(width=16, layers=1, steps=0)


def test_a_sweep_has_the_losses_of_training_one_after_another(model):
    together = sweep.Together(model, sweep.GRID)
    loop = sweep.by_loop(model, sweep.GRID)
    for step in range(10):
        ids = counting.sequences(3, 4, step)
        found, expected = together.step(ids), loop.step(ids)
        assert (found - expected).abs().max() <= 1e-5
    assert len(set(expected.tolist())) == len(sweep.GRID)
    for member, state in zip(sweep.GRID, stacking.unstack(together.stacked), strict=True):
        pair = state["trainable", "transformer.h.0.attn.c_attn.weight"]
        assert pair["A"].shape[-1] == member.rank


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft
def test_a_batch_of_many_adapters_has_the_logits_of_a_pass_for_each_and_of_peft(model):
    draws = (samplers.lora, samplers.random, samplers.top)
    states = [
        perturbed(rosa_func.init(model, 2 + place, key=place, sampler=draw), seed=place)
        for place, draw in enumerate(draws)
    ]
    rows = torch.tensor([2, 0, 1, 1, 2])
    ids = counting.sequences(rows, len(rows), 0)
    expected = adapters.one_by_one(model, states, rows, ids)
    based = [stacking.rebase(state, model) for state in states]
    served = adapters.Served(model, based)
    assert served.stacked["frozen", "transformer.h.0.attn.c_attn.weight"].stride(0) == 0
    assert relative_distance(served(rows, ids), expected) <= 1e-5
    by_peft = adapters.ServedByPeft(model, states)
    assert relative_distance(by_peft(rows, ids), expected) <= 1e-5
    assert relative_distance(served(rows.flip(0), ids), expected) > 0.01


def test_tasks_that_are_learned_together_are_learned_apart(model):
    states = adapters.train_together(model, 5)
    assert [s["trainable", "transformer.h.0.mlp.c_fc.weight", "A"].shape[-1] for s in states] == [
        *(2, 4, 8, 8)
    ]
    assert all(s["trainable", "transformer.h.0.mlp.c_fc.weight", "B"].any() for s in states)
