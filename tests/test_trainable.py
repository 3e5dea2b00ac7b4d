"""Counts of values, and the hint of those who forget to switch gradients on."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rosa_func
from models import seeded, tiny_gpt2, token_ids


@given(m=st.integers(1, 20), n=st.integers(1, 20), data=st.data())
def test_the_count_of_an_adapted_weight_is_r_times_the_sum_of_its_sides(m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    model = nn.Sequential(nn.Linear(n, m), nn.BatchNorm1d(m))
    counted = rosa_func.count(rosa_func.init(model, r, train="1"))
    assert counted.weights["0.weight"] == (r * (m + n), m * n)
    assert counted.weights["0.bias"] == (0, m)
    assert counted.weights["1.bias"] == (m, m)
    assert counted.weights["1.num_batches_tracked"] == (0, 1)
    assert counted.trainable == r * (m + n) + 2 * m
    assert counted.total == m * n + 5 * m + 1


def test_counts_add_up_to_the_leaves_and_to_the_model():
    model = seeded(tiny_gpt2)
    state = rosa_func.init(model, {"wte": 2, "*": 3}, targets=["wte", "c_attn"], train="*ln_*")
    counted = rosa_func.count(state)
    assert counted.trainable == sum(leaf.numel() for leaf in rosa_func.parameters(state))
    assert counted.total == sum(p.numel() for p in model.parameters())  # the tied weight once
    assert counted.weights.keys() == rosa_func.merge(state).keys()
    assert (counted.trainable, counted.total) == tuple(
        sum(column) for column in zip(*counted.weights.values(), strict=True)
    )


def test_a_convolution_weight_counts_as_a_matrix():
    state = rosa_func.init(nn.Conv2d(4, 6, 3), 2, targets="weight")
    assert rosa_func.count(state).weights["weight"] == (2 * (6 + 36), 6 * 36)


def test_a_count_prints_as_an_aligned_table():
    model = nn.Sequential(nn.Linear(60, 40), nn.LayerNorm(40))
    lines = str(rosa_func.count(rosa_func.init(model, 2, train="1.bias"))).splitlines()
    assert [line.split() for line in lines] == [
        ["all", "240", "of", "2,520", "9.524%"],
        ["0.weight", "200", "of", "2,400", "8.333%"],
        ["1.bias", "40", "of", "40", "100.000%"],
    ]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_a_loss_in_training_without_any_gradient_is_warned_of():
    """Without `parameters(state)` torch says "element 0 of tensors does not require grad"."""
    model, ids = seeded(tiny_gpt2).train(), token_ids(2, 8)
    state = rosa_func.init(model, 2, train="ln_f")
    with pytest.warns(UserWarning, match=r"no leaf of the state.*parameters\(state\)") as warned:
        rosa_func.call(model, state, ids, labels=ids)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rosa_func.call(model, state, ids)  # whose loss, if any, is the caller's
        with torch.no_grad():
            rosa_func.call(model, state, ids, labels=ids)
        rosa_func.call(model.eval(), state, ids, labels=ids)

        def loss(trainable):
            return rosa_func.call(model, state.replace(trainable=trainable), ids, labels=ids).loss

        model.train()
        torch.func.grad(loss)(state["trainable"])
        rosa_func.parameters(state)
        rosa_func.call(model, state, ids, labels=ids)
        new = rosa_func.resample(state, 1)
    with pytest.warns(UserWarning, match="no leaf of the state"):
        rosa_func.call(model, new, ids, labels=ids)
