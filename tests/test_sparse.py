"""Robust adaptation: where the places of a sparse part come from, and what adding it changes."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from cases import DTYPES, LAYOUTS, SEEDS, adapt_every_weight, with_sparse
from models import randn, seeded, two_layers
from references import (
    perturbed,
    relative_distance,
    state_bytes,
    tensor_bytes,
)
from rosa_func import checkpoint as files
from rosa_func import sparse
from rosa_func._supports import budgets, checked
from rosa_func.module import RosaModule

EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    result = model(batch)
    return getattr(result, "logits", result).square().mean()


def largest(scores: np.ndarray, k: int) -> list[int]:
    """Return the places of the k largest by a stable sort: of equal ones the first."""
    return sorted(np.argsort(-scores.astype(np.float64).ravel(), kind="stable")[:k].tolist())


class TestSupport:
    @given(
        m=st.integers(1, 9),
        n=st.integers(1, 9),
        experts=st.integers(0, 3),
        values=st.sampled_from([1, 3, 1000]),  # how many there are: ties or none
        density=st.floats(1e-3, 1),
        seed=SEEDS,
    )
    def test_it_is_a_stable_top_k(self, m, n, experts, values, density, seed):
        generator = torch.Generator().manual_seed(seed)
        shape = (experts, m, n) if experts else (m, n)
        score = 1.0 + torch.randint(values, shape, generator=generator)
        k = max(1, int(round(density * m * n, 6)))
        found = sparse.support({"w": score}, density)["w"]
        assert found.dtype == torch.int32
        matrices = score.view(-1, m, n).numpy()
        assert found.view(-1, k).tolist() == [largest(matrix, k) for matrix in matrices]

    @given(
        sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
        values=st.sampled_from([1, 3, 1000]),
        density=st.floats(1e-2, 1),
        seed=SEEDS,
    )
    def test_across_the_model_too(self, sizes, values, density, seed):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            f"w{i}": 1.0 + torch.randint(values, size, generator=generator)
            for i, size in enumerate(sizes)
        }
        budget = sum(max(1, int(round(density * m * n, 6))) for m, n in sizes)
        chosen = largest(np.concatenate([s.numpy().ravel() for s in scores.values()]), budget)
        found = sparse.support(scores, density, across="model")
        start = 0
        for name, score in scores.items():
            inside = [p - start for p in chosen if start <= p < start + score.numel()]
            assert (found[name].tolist() if name in found else []) == inside
            start += score.numel()

    def test_across_a_batch_and_dtypes(self):
        """A float64 score was compared in float32, where it ties with one below it."""
        wide = torch.tensor([[1 + 1e-12, 2.0]], dtype=torch.float64)
        scores = {"a": torch.tensor([[1.0, 0.5]]), "b": wide}
        found = sparse.support(scores, 0.5, across="model")
        assert {name: p.tolist() for name, p in found.items()} == {"b": [0, 1]}
        experts = torch.tensor([[[9.0, 1.0, 8.0, 7.0]], [[2.0, 3.0, 0.5, 0.4]]])
        found = sparse.support({"e": experts, "w": torch.full((1, 4), 2.5)}, 0.5, across="model")
        # 6 places: 9 8 7 3 of the experts, two each, and 2.5 2.5
        assert {n: p.tolist() for n, p in found.items()} == {"e": [[0, 2], [0, 1]], "w": [0, 1]}

    def test_a_mapping_of_densities_takes_the_first_match(self):
        scores = {f"h.{i}.fc.weight": randn(10, 10, seed=i).abs() for i in range(3)}
        found = sparse.support(scores, {"h.0.*": 0.5, "h.[01].*": 0.1})
        assert {name: len(p) for name, p in found.items()} == {
            "h.0.fc.weight": 50,
            "h.1.fc.weight": 10,
        }

    @pytest.mark.parametrize(
        ("density", "total"), [(0.005, 424_656), (0.01, 849_312), (0.02, 1_698_660)]
    )
    def test_budgets_of_gpt2_small(self, density, total):
        layer = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768)}
        layer |= {"mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
        shapes = {f"h.{i}.{n}.weight": torch.Size(s) for i in range(12) for n, s in layer.items()}
        assert sum(budgets(shapes, density).values()) == total
        assert budgets({"w": torch.Size((10, 10))}, 0.29) == {"w": 29}  # not 28.999999999999996

    @pytest.mark.parametrize("across", ["weight", "model"])
    def test_places_without_a_score_are_said_to_be_arbitrary(self, across):
        scores = {"dead": torch.zeros(4, 5), "fine": torch.ones(4, 5)}
        with pytest.warns(UserWarning, match=r"score is zero.*dead \(\d+ of \d+\)") as caught:
            sparse.support(scores, 0.8, across=across)
        assert "fine" not in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparse.support(scores, {"fine": 0.8}, across=across)
            sparse.support(scores, 1.0, across=across)  # all places: nothing was chosen

    def test_int32_counts_what_it_can(self):
        places = torch.tensor([0, 7])
        assert checked("w", places, torch.Size((1, 2**31 - 1))).dtype == torch.int32
        assert checked("w", places, torch.Size((2**16, 2**15))).dtype == torch.int64

    @given(density=st.sampled_from([0.01, 0.3, 0.6, 1.0]), key=SEEDS)
    def test_places_at_random(self, density, key):
        state = rosa_func.init(two_layers(), 2)
        found = sparse.support_random(state, density, key)
        for name, places in found.items():
            size = state["frozen", name].numel()
            assert len(places.unique()) == len(places) == max(1, int(round(density * size, 6)))
            alone = sparse.support_random(state, {name: density}, key)
            assert torch.equal(alone[name], places)  # whatever else is adapted

    @pytest.mark.parametrize("density", [0.2, 0.7])
    def test_places_at_random_prefer_none(self, density):
        """Each of 24 is drawn as often: within five standard deviations of 400 draws."""
        state = rosa_func.init(nn.Linear(6, 4), 0)
        draws = [sparse.support_random(state, density, key)["weight"] for key in range(400)]
        counts, p = torch.cat(draws).bincount(minlength=24), len(draws[0]) / 24
        assert ((counts - 400 * p).abs() <= 5 * (400 * p * (1 - p)) ** 0.5).all()

    def test_two_processes_find_the_same(self):
        here: dict[str, Any] = {}
        exec(SUPPORTS, here)
        other = subprocess.run(
            [sys.executable, "-c", f"{SUPPORTS}\nprint(digest)"],
            cwd=Path(rosa_func.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": "7"},
        )
        assert other.stdout.strip() == here["digest"]


# By scores, and at random.
SUPPORTS = """
import torch, rosa_func
from rosa_func import sparse
model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8))
values = torch.Generator().manual_seed(0)
weights = {n: torch.randn(p.shape, generator=values) for n, p in model.named_parameters()}
model.load_state_dict(weights)
state, x = rosa_func.init(model, 2), torch.randn(16, 6, generator=values)
scores = sparse.scores(model, state, x.split(4), lambda model, x: model(x).square().mean())
found = {f"all.{n}": p for n, p in sparse.support(scores, 0.2, across="model").items()}
found |= {f"each.{n}": p for n, p in sparse.support(scores, 0.2).items()}
digest = rosa_func.checkpoint.digest(found | sparse.support_random(state, 0.2, 3))"""


class TestAddAndRemove:
    @EACH_LAYOUT
    @pytest.mark.parametrize("r", [0, 2])
    def test_add_changes_nothing(self, layout, r):
        module, x = layout.build(6, 8), layout.input(6, 8, torch.float32)
        state = perturbed(adapt_every_weight(module, r))
        support = sparse.support_random(state, 0.2, 0)
        new = sparse.add(state, support)
        assert torch.equal(rosa_func.call(module, new, x), rosa_func.call(module, state, x))
        (name,) = state["input_dim"].keys()
        for path, tensor in state.items(include_nested=True, leaves_only=True):
            assert new[path] is tensor
        assert tensor_bytes(new["fixed", name, "support"]) == tensor_bytes(support[name])
        assert new["fixed", name, "support"].data_ptr() != support[name].data_ptr()

    @pytest.mark.parametrize("on", [False, True])
    def test_values_require_a_gradient_where_the_factors_do(self, on):
        state = rosa_func.init(two_layers(), 2)
        if on:
            rosa_func.parameters(state)
        new = sparse.add(state, {"0.weight": torch.tensor([5, 1])})
        values = new["trainable", "0.weight", "values"]
        assert values.requires_grad is on and values.is_leaf
        assert new["fixed", "0.weight", "support"].tolist() == [1, 5]
        counted = rosa_func.count(new)
        assert counted.trainable == 2 * (6 + 4) + 2 * (4 + 8) + 2

    @EACH_LAYOUT
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cycles_keep_every_bit_of_the_weight(self, layout, dtype):
        """With exact=True. Ranks go to 0 and back; the support is kept or given."""
        module = seeded(lambda: layout.build(6, 8)).to(dtype)
        state = with_sparse(adapt_every_weight(module, 2, exact=True), 0.2)
        for key, r in enumerate([2, 0, 3, 0]):
            merged = rosa_func.merge(state)
            new = rosa_func.resample(state, key, r=r)
            for name, w in rosa_func.merge(new).items():
                assert torch.equal(w, merged[name])
            assert not any(
                new["trainable", name, "values"].any() for name in new["input_dim"].keys()
            )
            state = perturbed(new, seed=key)

    @EACH_LAYOUT
    def test_remove_gives_the_values_to_the_residual(self, layout):
        module, x = layout.build(6, 8), layout.input(6, 8, torch.float32)
        state = with_sparse(adapt_every_weight(module, 2), 0.2)
        new, merged = sparse.remove(state), rosa_func.merge(state)
        assert "fixed" not in new.keys()
        expected = rosa_func.call(module, state, x)
        assert relative_distance(rosa_func.call(module, new, x), expected) <= 1e-5
        module.load_state_dict(merged)
        assert relative_distance(module(x), expected) <= 1e-5
        other = sparse.add(new, sparse.support_random(new, 0.3, 9))
        assert torch.equal(rosa_func.call(module, other, x), rosa_func.call(module, new, x))

    def test_a_saved_state_goes_on_bit_for_bit(self, tmp_path):
        model, batches = two_layers(), [randn(4, 6, seed=s) for s in range(6)]
        state = with_sparse(rosa_func.init(model, 2), 0.2)
        files.save(tmp_path / "state.safetensors", state)
        loaded = files.load(tmp_path / "state.safetensors")[0]
        ends = []
        for one in (state, loaded):
            optimizer = torch.optim.AdamW(rosa_func.parameters(one), lr=0.1)
            for batch in batches:
                loss_of(rosa_func.adapted(model, one), batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(state_bytes(rosa_func.resample(one, 1)))
        assert ends[0] == ends[1]

    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
    def test_rank_0_trains_the_values_alone(self, options):
        model, batch = two_layers(), randn(4, 6)
        state = sparse.add(
            rosa_func.init(model, 0), sparse.support_random(rosa_func.init(model, 0), 0.2, 0)
        )
        leaves = rosa_func.parameters(state)
        optimizer = torch.optim.AdamW(leaves, lr=0.1, **options)
        losses = []
        for _ in range(5):
            losses.append(loss_of(rosa_func.adapted(model, state), batch))
            losses[-1].backward()
            assert torch.nn.utils.clip_grad_norm_(leaves, 1.0).isfinite()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        assert rosa_func.count(state).trainable == 4 + 6  # int(0.2 24) + int(0.2 32)
        module = RosaModule(model, state)
        expected = rosa_func.call(model, state, batch)
        assert torch.equal(module(batch), expected)
        module.resample(1)
        assert relative_distance(module(batch), expected) <= 1e-5


def test_planted_entries_are_found_and_robust_is_better_than_either_part():
    """At one budget. The true change is of rank 2, and 40 large entries."""
    m, n, r, k = 20, 20, 2, 40
    shares, wins = [], 0
    for seed in range(10):
        model, X = nn.Linear(n, m, bias=False).double(), randn(200, n, seed=seed).double()
        model.load_state_dict({"weight": randn(m, n, seed=seed).double()})
        planted = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))[:k]
        change = 0.2 * randn(m, r, seed=seed + 50).double() @ randn(r, n, seed=seed + 90).double()
        change.view(-1)[planted] += 3 * randn(k, seed=seed + 70).sign().double()
        Y = X @ (model.weight.detach() + change).T

        def loss(model: nn.Module, _: None, X: Tensor = X, Y: Tensor = Y) -> Tensor:
            return (model(X) - Y).square().mean()

        low, both, none = (
            rosa_func.init(model, rank, sampler=rosa_func.samplers.lora)
            for rank in (r + k // (m + n), r, 0)
        )
        scores = sparse.scores(model, both, [None], loss)
        both = sparse.add(both, support := sparse.support(scores, k / (m * n)))
        shares.append(torch.isin(planted, support["weight"]).double().mean())
        alone = sparse.add(none, sparse.support(scores, (k + r * (m + n)) / (m * n)))
        assert len({rosa_func.count(state).trainable for state in (low, both, alone)}) == 1
        ends = [fitted(model, state, loss) for state in (low, both, alone)]
        wins += ends[1] < min(ends[0], ends[2])
    assert min(shares) >= 0.9
    assert wins >= 9


def fitted(model: nn.Module, state: TensorDict, loss: Callable[..., Tensor]) -> float:
    """Train a state, and return its loss."""
    optimizer = torch.optim.LBFGS(
        rosa_func.parameters(state), max_iter=40, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(rosa_func.adapted(model, state), None)
        value.backward()
        return value.detach()

    optimizer.step(closure)
    return float(closure())
