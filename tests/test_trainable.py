"""The leaves that train, counts of values, and the hint that no gradient is switched on."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

import rosa_func
from models import randn, seeded, tiny_gpt2, token_ids, two_layers
from references import dense_weights
from rosa_func.weight.layout import leaves


@pytest.mark.parametrize("left_out", ["input", "output", "full"])
def test_parameters_are_what_groups_chose(left_out: str):
    """Clipped by `parameters`, the norm grew at each step of one batch: 5.6, 9.6, 16.7, 24.2."""
    model, x = two_layers(), randn(3, 6)
    state = rosa_func.init(model, 2, train="*.bias")
    groups = rosa_func.optim.groups(state, **{left_out: None})
    chosen = [leaf for group in groups for leaf in group["params"]]
    flags = {name: leaf.requires_grad for name, leaf in leaves(state).items()}
    optimizer = torch.optim.SGD(groups, 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        rosa_func.call(model, state, x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(rosa_func.parameters(state), 1e9)
        output = torch.func.functional_call(model, dense_weights(state), (x,))
        gradients = torch.autograd.grad(output.square().sum(), chosen)
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        optimizer.step()
    named = rosa_func.named_parameters(state)
    assert {id(leaf) for leaf in named.values()} == set(map(id, chosen))
    assert {name: leaf.requires_grad for name, leaf in leaves(state).items()} == flags
    rosa_func.optim.groups(state)
    assert len(rosa_func.parameters(state)) == len(flags)  # chosen again


COPIES: dict[str, Callable[[TensorDict], TensorDict]] = {
    "clone": lambda state: state.clone(),
    "deepcopy": copy.deepcopy,
    "to": lambda state: state.to(torch.float64),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_no_leaf_says_how_to_make_one(how: str):
    """`parameters` of a copy was silent, and the optimizer refused it later."""
    state = rosa_func.init(two_layers(), 2)
    assert rosa_func.parameters(COPIES[how](state))  # before there is a gradient
    rosa_func.parameters(state)
    copied = COPIES[how](state)
    if all(leaf.is_leaf for leaf in leaves(copied).values()):
        pytest.skip("a copy of this tensordict has leaves")
    for function in (rosa_func.parameters, rosa_func.named_parameters):
        with pytest.raises(ValueError, match=r"0\.weight\.A is not a leaf.*detach\(\)\.clone\(\)"):
            function(copied)
    assert not any(leaf.is_leaf for leaf in leaves(copied).values())
    own = COPIES[how](state.detach()).clone()
    torch.optim.SGD(rosa_func.parameters(own), 0.1)
    pointers = [leaf.data_ptr() for leaf in rosa_func.parameters(own)]
    assert not set(pointers) & {leaf.data_ptr() for leaf in rosa_func.parameters(state)}


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


def test_a_state_that_trains_nothing_is_refused():
    """It trained without an error, and nothing changed."""
    with pytest.raises(ValueError, match=r"its ranks are 0.*sparse\.add"):
        rosa_func.parameters(rosa_func.init(two_layers(), 0))


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
