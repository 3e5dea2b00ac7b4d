"""Several states as one: what a stack holds, what vmap, select and rebase compute with it."""

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from models import randn, seeded, stock_moe, tiny_gpt2, token_ids, two_layers
from references import (
    dense_weights,
    perturbed,
    relative_distance,
    state_bytes,
    storage_pointers,
)
from rosa_func import _torch, samplers, sparse, stacking

TOLERANCE = 1e-5  # float32: two ways to sum the same tens of products, over a few layers
RANKS = (1, 4, 2)
X = randn(5, 6)
SHARING = pytest.mark.parametrize("sampler", [samplers.lora, samplers.random])


def states_of(
    model: nn.Module, sampler: samplers.Sampler = samplers.lora, **options: object
) -> list[TensorDict]:
    """Return states of several ranks, as if trained."""
    drawn = (rosa_func.init(model, r, key=r, sampler=sampler, **options) for r in RANKS)
    return [perturbed(state, seed=seed) for seed, state in enumerate(drawn)]


def forward(model: nn.Module) -> Callable[[TensorDict, Tensor], Tensor]:
    return lambda state, x: rosa_func.call(model, state, x)


def expected(model: nn.Module, state: TensorDict, x: Tensor) -> Tensor:
    """Compute with dense weights, by no code of the library."""
    return torch.func.functional_call(model, dense_weights(state), (x,))


class TestStack:
    @SHARING
    @pytest.mark.parametrize("options", [{}, {"train": "0.bias"}, {"exact": True}])
    def test_unstacked_it_is_the_states_bit_for_bit(self, sampler, options):
        states = states_of(two_layers(), sampler, **options)
        before = [state_bytes(state) for state in states]
        found = stacking.unstack(stacking.stack(states))
        assert [state_bytes(state) for state in found] == before
        assert [state_bytes(state) for state in states] == before

    def test_of_one_rank_it_has_the_values_of_torch_stack(self):
        states = [rosa_func.init(two_layers(), 2, key=key, train="2.bias") for key in range(3)]
        assert state_bytes(stacking.stack(states)) == state_bytes(torch.stack(states))

    def test_the_weights_of_the_model_are_in_memory_once(self):
        """torch.stack held them once for each state."""
        model = two_layers()
        stacked = stacking.stack(states_of(model))
        own = storage_pointers([*model.parameters()])
        frozen = [stacked["frozen", name] for name, _ in model.named_parameters()]
        assert storage_pointers(frozen) == own
        of_each = stacking.stack(states_of(model, samplers.random))["frozen", "0.weight"]
        assert of_each.is_contiguous() and not storage_pointers([of_each]) & own

    def test_equal_weights_of_other_memory_are_kept_once_too(self):
        """As of states that were loaded from files."""
        states = [state.clone() for state in states_of(two_layers())]
        assert stacking.stack(states)["frozen", "0.weight"].stride(0) == 0

    def test_what_trains_is_of_each_even_where_it_starts_equal(self):
        states = [rosa_func.init(two_layers(), 2, key=0, train="0.bias") for _ in range(2)]
        stacked = stacking.stack(states)
        assert all(leaf.is_contiguous() for leaf in rosa_func.parameters(stacked))

    def test_states_that_require_gradients_give_leaves_that_do_not(self):
        states = states_of(two_layers())
        for state in states:
            rosa_func.parameters(state)
        leaves = stacking.stack(states)["trainable"].values(True, True)
        assert all(leaf.is_leaf and not leaf.requires_grad for leaf in leaves)

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
    def test_what_is_filled_up_stays_exactly_zero_in_training(self, make):
        model = two_layers()
        stacked = stacking.stack([rosa_func.init(model, r, sampler=samplers.lora) for r in RANKS])
        optimizer = make(rosa_func.parameters(stacked), lr=0.1)
        for seed in range(5):
            optimizer.zero_grad()
            y = stacking.vmap(forward(model), (0, None))(stacked, randn(3, 6, seed=seed))
            y.square().sum().backward()
            optimizer.step()
        found = stacking.unstack(stacked)
        for r, place, state in zip(RANKS, stacked["trainable"].unbind(0), found, strict=True):
            for name, pair in place.items():
                assert pair["A"][:, :r].all() and not pair["A"][:, r:].any()
                assert pair["B"][:r].all() and not pair["B"][r:].any()
                assert state["trainable", name, "A"].shape[-1] == r

    def test_rank_zero_and_sparse_parts(self):
        model = two_layers()
        bare = rosa_func.init(model, 0, sampler=samplers.lora)
        support = sparse.support_random(bare, 0.2, key=1)
        states = [perturbed(sparse.add(rosa_func.init(model, r), support)) for r in (0, 3)]
        stacked = stacking.stack(states)
        y = stacking.vmap(forward(model), (0, None))(stacked, X)
        for state, result in zip(states, y, strict=True):
            assert relative_distance(result, expected(model, state, X)) <= TOLERANCE
        found = [state_bytes(state) for state in stacking.unstack(stacked)]
        assert found == [state_bytes(state) for state in states]

    def test_experts(self):
        model, _, _ = stock_moe("mixtral", "eager")
        states = states_of(model)
        stacked = stacking.stack(states)
        for state, found in zip(states, stacking.unstack(stacked), strict=True):
            assert state_bytes(found) == state_bytes(state)


class TestRefusals:
    def test_there_must_be_states(self):
        with pytest.raises(ValueError, match="no states to stack"):
            stacking.stack([])

    def test_states_of_another_shape_are_named(self):
        other = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 8)))
        states = [rosa_func.init(model, 2) for model in (two_layers(), other)]
        with pytest.raises(ValueError, match=r"0\.\w+ in \w+ is \(4.* in state 0 and \(5.*state 1"):
            stacking.stack(states)

    def test_states_of_another_model_or_other_targets_are_named(self):
        model = two_layers()
        states = [rosa_func.init(model, 2), rosa_func.init(model, 2, targets="0.weight")]
        for pair, has in ((states, 0), (states[::-1], 1)):
            with pytest.raises(KeyError, match=rf"state {has} has 2\.weight\S* in .*one model"):
                stacking.stack(pair)

    def test_states_of_other_dtypes_are_named(self):
        states = [rosa_func.init(two_layers().to(dtype), 2) for dtype in (None, torch.float64)]
        with pytest.raises(ValueError, match=r"torch\.float32 .* state 0 and .* torch\.float64"):
            stacking.stack(states)

    def test_supports_of_other_sizes_are_named(self):
        state = rosa_func.init(two_layers(), 2)
        states = [
            sparse.add(state, sparse.support_random(state, density, key=0))
            for density in (0.1, 0.3)
        ]
        with pytest.raises(ValueError, match=r"0\.weight\.\w+ in .* in state 0 and"):
            stacking.stack(states)

    def test_a_stack_of_stacks(self):
        stacked = stacking.stack(states_of(two_layers()))
        with pytest.raises(ValueError, match="stacked already, with 3 members: unstack it first"):
            stacking.stack([stacked, stacked])

    def test_ranks_that_do_not_fit(self):
        state = states_of(two_layers())[1]
        state["trainable", "0.weight", "A"] = randn(4, 3)
        with pytest.raises(ValueError, match=r"0\.weight: the factors have shapes \(4, 3\)"):
            stacking.stack([state])

    @pytest.mark.parametrize(
        "use",
        [
            stacking.unstack,
            lambda state: stacking.select(state, [0]),
            lambda state: stacking.vmap(lambda state: X)(state),
        ],
    )
    def test_what_is_not_stacked(self, use):
        with pytest.raises(ValueError, match=r"not stacked: its batch size is \(\).*stack\("):
            use(rosa_func.init(two_layers(), 2))
        with pytest.raises(TypeError, match="a stacked state is a TensorDict, got list"):
            use([rosa_func.init(two_layers(), 2)])

    @pytest.mark.parametrize(
        ("rows", "error", "complaint"),
        [
            ([0, 3], ValueError, "ask for the member 3, and there are 3, 0 to 2"),
            ([-1, 2], ValueError, "ask for the member -1, and there are 3, 0 to 2"),
            ([], ValueError, r"the shape \(0,\)"),
            ([[0, 1]], ValueError, r"the shape \(1, 2\)"),
            ([0.0, 1.0], TypeError, r"got torch\.float32"),
            ([True, False, True], TypeError, r"got torch\.bool"),
        ],
    )
    def test_rows_that_are_no_members(self, rows, error, complaint):
        stacked = stacking.stack(states_of(two_layers()))
        with pytest.raises(error, match=complaint):
            stacking.select(stacked, rows)

    def test_a_batch_without_its_adapters(self):
        """torch's vmap says that sizes of the mapped dimension differ, and not what to do."""
        stacked, each = stacking.stack(states_of(two_layers())), forward(two_layers())
        with pytest.raises(ValueError, match=r"argument 1 has 5 rows, .* 3 members: .*select"):
            stacking.vmap(each)(stacked, X)
        with pytest.raises(
            ValueError, match=r"in_dims is 0 for the stacked state, got \(None, 0\)"
        ):
            stacking.vmap(each, (None, 0))(stacked, X)


class TestVmap:
    @SHARING
    def test_it_computes_each_member(self, sampler):
        model = two_layers()
        states = states_of(model, sampler, train="0.bias")
        stacked = stacking.stack(states)
        alike = stacking.vmap(forward(model), in_dims=(0, None))(stacked, X)
        own = stacking.vmap(forward(model))(stacked, randn(3, 5, 6))
        for state, one, other, x in zip(states, alike, own, randn(3, 5, 6), strict=True):
            assert relative_distance(one, expected(model, state, X)) <= TOLERANCE
            assert relative_distance(other, expected(model, state, x)) <= TOLERANCE

    @SHARING
    def test_gradients_are_those_of_each_member(self, sampler):
        model = two_layers()
        stacked = stacking.stack(states_of(model, sampler))
        leaves = rosa_func.named_parameters(stacked)
        y = stacking.vmap(forward(model), (0, None))(stacked, X)
        found = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        for place, state in enumerate(stacked.detach().clone().unbind(0)):
            own = list(rosa_func.named_parameters(state).values())
            loss = expected(model, state, X).square().sum()
            for g, e in zip(found, torch.autograd.grad(loss, own), strict=True):
                assert (g[place] - e).abs().max() <= TOLERANCE * e.abs().max()

    def test_shared_weights_are_not_batched(self):
        """Under torch's vmap they are, and each member has a product with them of its own."""
        model = two_layers()
        seen = []

        def look(state: TensorDict) -> Tensor:
            R, A = state["frozen", "0.weight"], state["trainable", "0.weight", "A"]
            seen.append([_torch.is_wrapped(R), _torch.is_wrapped(A)])
            return A.sum()

        stacking.vmap(look)(stacking.stack(states_of(model)))
        stacking.vmap(look)(stacking.stack(states_of(model, samplers.random)))
        assert seen == [[False, True], [True, True]]

    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    def test_gpt2_and_torch_options(self):
        model = seeded(lambda: tiny_gpt2(dropout=0.5)).eval()
        ids = token_ids(3, 6)
        states = states_of(model, targets=["wte", "c_attn", "c_fc"])

        def logits(state: TensorDict) -> Tensor:
            return rosa_func.call(model, state, ids, use_cache=False).logits

        stacked = stacking.stack(states)
        found = stacking.vmap(logits, out_dims=1, chunk_size=2)(stacked)
        for place, state in enumerate(states):
            weights = dense_weights(state)
            e = torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits
            assert relative_distance(found[:, place], e) <= TOLERANCE


class TestSelect:
    @SHARING
    def test_each_row_is_computed_with_its_own(self, sampler):
        model, rows = two_layers(), torch.tensor([2, 0, 0, 1, 2])
        states = states_of(model, sampler, train="0.bias")
        chosen = stacking.select(stacking.stack(states), rows)
        y = stacking.vmap(forward(model))(chosen, X)
        for row, x, result in zip(rows, X, y, strict=True):
            assert relative_distance(result, expected(model, states[row], x)) <= TOLERANCE
        assert chosen.batch_size == (5,)
        if sampler is samplers.lora:
            assert chosen["frozen", "0.weight"].stride(0) == 0

    def test_gradients_go_back_to_the_members_that_were_asked_for(self):
        model, rows = two_layers(), [2, 0, 0, 2, 2]
        stacked = stacking.stack(states_of(model))
        leaves = rosa_func.parameters(stacked)
        y = stacking.vmap(forward(model))(stacking.select(stacked, rows), X)
        found = torch.autograd.grad(y.square().sum(), leaves)
        for place, state in enumerate(stacked.detach().clone().unbind(0)):
            chosen = X[torch.tensor(rows) == place]
            own = rosa_func.parameters(state)
            loss = expected(model, state, chosen).square().sum()
            for g, e in zip(found, torch.autograd.grad(loss, own), strict=True):
                assert (g[place] - e).abs().max() <= TOLERANCE * e.abs().max()


class TestRebase:
    def test_states_of_several_draws_and_cycles_share_the_weights_of_the_model(self):
        model = two_layers()
        states = [
            perturbed(rosa_func.resample(s, 7), 0.1) for s in states_of(model, samplers.random)
        ]
        based = [stacking.rebase(state, model) for state in states]
        stacked = stacking.stack(based)
        y = stacking.vmap(forward(model), (0, None))(stacked, X)
        for state, result in zip(states, y, strict=True):
            assert relative_distance(result, expected(model, state, X)) <= TOLERANCE
        frozen = [stacked["frozen", name] for name, _ in model.named_parameters()]
        assert storage_pointers(frozen) == storage_pointers([*model.parameters()])

    @pytest.mark.parametrize("options", [{"exact": True}, {"train": "0.bias"}])
    def test_it_keeps_what_else_the_state_has(self, options):
        model = two_layers()
        state = rosa_func.init(model, 2, **options)
        support = sparse.support_random(state, 0.2, key=0)
        state = perturbed(sparse.add(state, support))
        new = stacking.rebase(state, model)
        assert relative_distance(expected(model, new, X), expected(model, state, X)) <= TOLERANCE
        paths = [set(s.keys(True, True)) for s in (state, new)]
        assert paths[0] == paths[1]
        for name in support:
            assert torch.equal(new["fixed", name, "support"], state["fixed", name, "support"])
        again = rosa_func.resample(new, 1)
        assert relative_distance(expected(model, again, X), expected(model, state, X)) <= TOLERANCE

    def test_a_rank_is_kept_to(self):
        model = two_layers()
        state = perturbed(rosa_func.init(model, 2))
        new = stacking.rebase(state, model, rank=1)
        assert new["trainable", "0.weight", "A"].shape == (4, 1)

    def test_it_does_not_share_what_trains(self):
        model = two_layers()
        state = rosa_func.init(model, 2, train="0.bias")
        new = stacking.rebase(state, model)
        old = storage_pointers(state["trainable"].values(True, True))
        assert not storage_pointers(new["trainable"].values(True, True)) & old
