"""What `call` remembers of a model is true of it now, and keeps nothing alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

import rosa_func
from models import randn, seeded, tiny_gpt2, token_ids, two_layers
from references import perturbed, relative_distance
from rosa_func.places import places


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 6))


def replace_module(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 8)


def delete_and_add(model: nn.Sequential) -> None:
    weight = model[0].weight
    del model[0].weight
    model[0].weight = nn.Parameter(weight.detach().clone())


def swap_modules(model: nn.Sequential) -> None:
    model[0], model[1] = nn.Sequential(model[0]), model[1]


CHANGES = [replace_parameter, replace_module, delete_and_add]


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_was_replaced_is_seen(change):
    model, x = two_layers(), randn(3, 6)
    state = perturbed(rosa_func.init(model, 2))
    first = rosa_func.call(model, state, x)
    known = places(model)
    assert places(model) is known
    change(model)
    assert places(model) is not known
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert relative_distance(rosa_func.call(model, state, x), first) <= 1e-6
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())


def test_new_names_and_shapes_are_refused_after_a_call_that_fitted():
    model, x = two_layers(), randn(3, 6)
    state = rosa_func.init(model, 2)
    rosa_func.call(model, state, x)
    model[2] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"2\.weight has shape \(8, 4\) .*\(5, 4\)"):
        rosa_func.call(model, state, x)
    swap_modules(model)
    with pytest.raises(KeyError, match=r"lacks 0\.0\."):
        rosa_func.call(model, state, x)


def test_a_parameter_that_became_none_is_seen():
    model, x = nn.Sequential(nn.Linear(6, 4)), randn(3, 6)
    rosa_func.call(model, rosa_func.init(model, 2), x)
    model[0].bias = None
    without = rosa_func.init(model, 2)
    assert relative_distance(rosa_func.call(model, without, x), model(x)) <= 1e-6


def test_a_shape_that_was_changed_through_data_is_seen():
    model = nn.Sequential(nn.Linear(6, 4))
    rosa_func.call(model, rosa_func.init(model, 2), randn(3, 6))
    model[0].weight.data = randn(4, 8)
    x, state = randn(3, 8), rosa_func.init(model, 2)
    assert relative_distance(rosa_func.call(model, state, x), model(x)) <= 1e-6


def test_a_tie_that_was_made_or_cut_is_seen():
    model, ids = seeded(tiny_gpt2).eval(), token_ids(2, 5)
    state = perturbed(rosa_func.init(model, 2, targets="wte"))
    tied = rosa_func.call(model, state, ids).logits
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        rosa_func.call(model, state, ids)
    model.lm_head.weight = model.transformer.wte.weight
    assert torch.equal(rosa_func.call(model, state, ids).logits, tied)


def test_modes_are_read_at_each_call():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), randn(5, 6)
    state = rosa_func.init(model, 2)
    for mode in (True, False, True):
        model.train(mode)
        assert relative_distance(rosa_func.call(model, state, x), model(x)) <= 1e-5
        model.load_state_dict(rosa_func.merge(state))


def test_what_is_remembered_does_not_keep_a_model_or_its_weights_alive():
    model = two_layers()
    model.parent_of_itself = [model]  # a cycle, which only the garbage collector ends
    state = rosa_func.init(model, 2)
    rosa_func.call(model, state, randn(3, 6))
    alive = [weakref.ref(model), weakref.ref(model[0]), weakref.ref(model[0].weight)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_a_call_inside_a_call_of_the_same_model():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.inner = None

        def forward(self, x):
            if self.inner is None:
                return self.linear(x)
            state, self.inner = self.inner, None
            y = rosa_func.call(self, state, x)
            return self.linear(y)

    model, x = seeded(Twice), randn(3, 6)
    one, other = (perturbed(rosa_func.init(model, 2), seed=seed) for seed in (0, 1))
    W, V = (rosa_func.merge(state) for state in (one, other))
    model.inner = other
    found = rosa_func.call(model, one, x)
    y = x @ V["linear.weight"].T + V["linear.bias"]
    assert relative_distance(found, y @ W["linear.weight"].T + W["linear.bias"]) <= 1e-5
