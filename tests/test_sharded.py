"""Sharded weights: what is computed, drawn and merged is that of whole ones, each rank has a share.

Laws run on a mesh of one process; what needs more is done by tests/sharded_worker.py.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import rosa_func
import sharded_worker
from forking import run_worker
from models import randn, seeded, tiny_gpt2, token_ids, two_layers
from modules import ExpertsInOneProduct
from references import relative_distance, state_bytes
from rosa_func import distributed, export, optim
from rosa_func.module import RosaModule
from rosa_func.weight import gathering, read
from sharded_worker import KINDS, loss_of, trained, whole_state

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = f"file://{tmp_path_factory.mktemp('mesh') / 'store'}"
    dist.init_process_group("gloo", store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the results of two processes and of four."""
    if not hasattr(os, "fork"):
        pytest.skip("the processes are forked")
    folder = tmp_path_factory.mktemp("processes")
    errors = run_worker(sharded_worker.__file__, folder)
    found = [
        (folder / str(size) / f"{rank}.pt").exists() for size in (2, 4) for rank in range(size)
    ]
    assert all(found), errors
    return folder


def outcomes(folder: Path, size: int) -> list[dict[str, Any]]:
    """Return the results of each of so many processes."""
    return [
        torch.load(folder / str(size) / f"{rank}.pt", weights_only=True) for rank in range(size)
    ]


@pytest.fixture(scope="module")
def two(processes: Path) -> list[dict[str, Any]]:
    return outcomes(processes, 2)


@pytest.fixture(scope="module")
def four(processes: Path) -> list[dict[str, Any]]:
    return outcomes(processes, 4)


@pytest.fixture
def hybrid(four: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what four processes find on a mesh that shards over two of them, twice."""
    return [process["hybrid"] for process in four]


RANKS = {"two": 2, "four": 4, "hybrid": 2}
EVERY_MESH = pytest.mark.parametrize("how", RANKS)


class TestProcesses:
    """A model of 70 billion weights does not fit a device; a share of its frozen weights does."""

    @EVERY_MESH
    def test_a_rank_has_its_share_of_the_rows(self, how: str, request: pytest.FixtureRequest):
        size = RANKS[how]
        for process in request.getfixturevalue(how):
            for own, total, largest in process["held"].values():
                assert own <= total / size + largest
                assert own < 0.75 * total

    @EVERY_MESH
    def test_losses_and_gradients_are_those_of_whole_weights(
        self, how: str, request: pytest.FixtureRequest
    ):
        for process in request.getfixturevalue(how):
            assert max(process["computed"].values()) < 1e-6, process["computed"]

    def test_gradients_of_checkpointed_layers_are_those_of_whole_weights(self, two: Any):
        """Their weights are gathered in another order in backward, which ranks share as well."""
        assert all(process["checkpointed"] < 1e-6 for process in two)

    @EVERY_MESH
    def test_draws_merges_and_changes_have_the_bits_of_whole_weights(
        self, how: str, request: pytest.FixtureRequest
    ):
        drawn = [process["drawn"] for process in request.getfixturevalue(how)]
        for each in drawn:
            assert all(each["same"].values()), each["same"]
        assert len({each["hash"] for each in drawn}) == 1

    @pytest.mark.parametrize("how", ["two", "four"])
    def test_each_weight_is_decomposed_by_one_rank(self, how: str, request: pytest.FixtureRequest):
        drawn = [process["drawn"] for process in request.getfixturevalue(how)]
        decomposed = [name for each in drawn for name in each["decomposed"]]
        assert sorted(decomposed) == sorted(drawn[0]["adapted"])

    def test_a_module_trains_under_ddp_as_in_one_process(self, two: Any):
        """With a resample on the way; the bound is that of sums of gradients in other orders."""
        assert all(process["module"] < 1e-5 for process in two)

    def test_a_failed_draw_in_one_process_is_raised_in_both(self, two: Any):
        assert two[0]["failing"].startswith("RuntimeError: rank 1 could not resample (ValueError: ")
        assert two[1]["failing"].startswith("ValueError: no draw of ")

    def test_rows_that_should_be_the_same_and_are_not_are_noticed(self, four: Any):
        said = "RuntimeError: the processes have different rows of ('frozen', 'transformer.wte."
        assert all(process["unequal"].startswith(said) for process in four)


class TestErrorsOfProcesses:
    """A skipped layer, or a process that died, let the others wait for ever."""

    def test_another_order_is_an_error_on_every_rank_that_names_the_weights(self, two: Any):
        for rank, process in enumerate(two):
            assert process["out of turn at first"].startswith(
                "RuntimeError: the ranks gather different weights, by rank: "
                f"['1.weight', '2.weight']; this is rank {rank}"
            )

    def test_another_order_than_before_is_an_error_on_every_rank(self, two: Any):
        for process in two:
            assert process["out of turn"].startswith("RuntimeError: ")
            assert "could not be gathered from all ranks" in process["out of turn"]

    def test_a_process_that_ended_is_an_error_that_names_the_weight(self, two: Any):
        assert two[0]["gone"].startswith("RuntimeError: transformer.")
        assert "could not be gathered from all ranks" in two[0]["gone"]


def layers_and_inputs(name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """Return a module, what it takes, and options of init."""
    x = randn(3, 6)
    if name == "conv":
        return (
            seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3))),
            randn(2, 3, 5, 5),
            {"targets": "*"},
        )
    if name == "experts":
        return seeded(lambda: ExpertsInOneProduct(5, 4)), randn(3, 5), {"targets": "*"}
    if name == "embedding":
        return (
            seeded(lambda: nn.Sequential(nn.Embedding(7, 6))),
            token_ids(3, 4) % 7,
            {"targets": "*"},
        )
    module = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    if name == "not adapted":
        return module, x, {"targets": "0"}
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    return module.to(dtype), x.to(dtype), {}


class TestOneProcess:
    @pytest.mark.parametrize(
        "name", ["linear", "bfloat16", "float16", "not adapted", "conv", "embedding", "experts"]
    )
    def test_every_kind_of_layer_computes_as_with_whole_weights(self, name: str, mesh: DeviceMesh):
        model, x, options = layers_and_inputs(name)
        found = []
        state = rosa_func.init(model, 2, **options)
        for each in (state, distributed.shard(state.clone(), mesh)):
            leaves = rosa_func.parameters(each)
            x = x.detach().clone().requires_grad_(x.is_floating_point())
            y = rosa_func.call(model, each, x)
            y.square().sum().backward()
            found.append([y, *(t.grad for t in (*leaves, x) if t.grad is not None)])
        for own, expected in zip(*found, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-6, atol=0)

    @EVERY_KIND
    def test_gather_reverses_shard(self, kind: str, mesh: DeviceMesh):
        state = whole_state(kind)
        sharded = distributed.shard(state, mesh)
        assert state_bytes(distributed.gather(sharded)) == state_bytes(state)
        assert rosa_func.count(sharded) == rosa_func.count(state)

    def test_transforms_of_torch_func_follow_sharded_weights(self, mesh: DeviceMesh):
        model, state = two_layers(), rosa_func.init(two_layers(), 2)
        x = randn(5, 3, 6)
        sharded = distributed.shard(state, mesh)

        def loss(trainable: TensorDict, state: TensorDict, x: Tensor) -> Tensor:
            whole = state.copy()
            whole["trainable"] = trainable
            return rosa_func.call(model, whole, x).square().sum()

        found = []
        for each in (sharded, state):
            one = torch.func.grad(loss)(each["trainable"], each, x[0])
            per_sample = torch.func.vmap(torch.func.grad(loss), (None, None, 0))(
                each["trainable"], each, x
            )
            found.append([*one.values(True, True), *per_sample.values(True, True)])
        for own, expected in zip(*found, strict=True):
            torch.testing.assert_close(own, expected)

    def test_autocast_computes_as_with_whole_weights(self, mesh: DeviceMesh):
        state = whole_state()
        with torch.autocast("cpu", torch.bfloat16):
            expected = trained(state)
            found = trained(distributed.shard(whole_state(), mesh))
        assert sharded_worker.furthest(found, expected) < 1e-6

    def test_a_known_order_is_not_agreed_on_again_and_comes_ahead(
        self, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
    ):
        events: list[tuple[str, str]] = []

        def noting(what: str, function: Any) -> Any:
            def noted(name: str, *args: Any) -> Any:
                events.append((what, name))
                return function(name, *args)

            return noted

        mesh = dist.init_device_mesh("cpu", (1,))  # whose order nobody knows
        state, model = distributed.shard(whole_state(), mesh), seeded(tiny_gpt2)
        rosa_func.parameters(state)
        for function in (gathering.agree, gathering.begin):
            noted = noting(function.__name__, function)
            monkeypatch.setattr(gathering, function.__name__, noted)
        for step in range(2):
            events.clear()
            loss_of(model, state, token_ids(3, 8)).backward()
            asked = [name for what, name in events if what == "agree"]
            begun = [name for what, name in events if what == "begin"]
            assert asked == (begun if step == 0 else [])
            if step == 0:
                first = begun
        assert begun == first

    def test_few_buffers_are_used_again_and_again(self, mesh: DeviceMesh):
        """Fresh memory for each gather grew a process by 60 MiB, and took as long as the gather."""
        model = seeded(lambda: nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]))
        state = distributed.shard(rosa_func.init(model, 2), mesh)
        rosa_func.parameters(state)
        for step in range(3):
            x = randn(3, 64).requires_grad_()
            before = [slot.data_ptr() for slot in all_buffers()]
            rosa_func.call(model, state, x).sum().backward()
            assert len(all_buffers()) <= 2
            if step == 2:
                assert before == [slot.data_ptr() for slot in all_buffers()]

    def test_what_is_held_is_not_written_over(self, mesh: DeviceMesh):
        state = whole_state()
        weights = read(distributed.shard(state, mesh)).adapted()
        held = {name: w.base.dense() for name, w in weights.items()}
        for name, w in read(state).adapted().items():
            assert torch.equal(held[name], w.base.dense())

    def test_moments_are_carried_over_a_resample(self, mesh: DeviceMesh):
        found = []
        for state in (whole_state(), distributed.shard(whole_state(), mesh)):
            optimizer = torch.optim.AdamW(rosa_func.parameters(state), 0.01, weight_decay=0.0)
            loss_of(seeded(tiny_gpt2), state, token_ids(3, 8)).backward()
            optimizer.step()
            new = distributed.resample(state, 1)
            optim.rebind(optimizer, state, new, moments="project")
            loss_of(seeded(tiny_gpt2), new, token_ids(3, 8)).backward()
            optimizer.step()
            found.append(rosa_func.parameters(new))
        assert sharded_worker.furthest(*found) < 1e-6

    def test_a_module_of_sharded_weights_hands_out_its_state(self, mesh: DeviceMesh):
        module = RosaModule(seeded(tiny_gpt2), distributed.shard(whole_state(), mesh))
        ids = token_ids(3, 8)
        before = module(ids).logits
        other = RosaModule(seeded(tiny_gpt2), distributed.shard(whole_state(), mesh))
        module.resample(1)
        other.load_state_dict(module.state_dict())
        assert relative_distance(other(ids).logits, before) < 1e-5
        assert state_bytes(distributed.gather(other.state)) == state_bytes(
            distributed.gather(module.state)
        )

    def test_patterns_choose_what_is_sharded(self, mesh: DeviceMesh):
        names = {
            name: {
                path[1]
                for path, t in distributed.shard(whole_state(), mesh, **options).items(True, True)
                if hasattr(t, "device_mesh")
            }
            for name, options in {
                "all": {},
                "some": {"targets": "mlp"},
                "others": {"exclude": ["wte", "attn"]},
            }.items()
        }
        layers = [f"{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")]
        mlp = {f"transformer.h.{layer}.weight" for layer in layers}
        assert names["some"] == mlp
        assert names["others"] == mlp | {"transformer.wpe.weight"}
        assert names["all"] > mlp | {"transformer.wte.weight"}


def all_buffers() -> list[Tensor]:
    return [slot for slots in gathering._buffers.values() for slot in slots]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"targets": "c_atn"}, "'c_atn' matches no parameter; the closest names are c_attn"),
            ({"exclude": "*"}, "there is nothing to shard"),
        ],
    )
    def test_patterns_that_choose_nothing_are_refused(
        self, options: Any, said: str, mesh: DeviceMesh
    ):
        with pytest.raises(ValueError, match=said):
            distributed.shard(whole_state(), mesh, **options)

    def test_what_is_no_mesh_is_refused(self):
        with pytest.raises(TypeError, match=r"the mesh is a DeviceMesh, .* got int"):
            distributed.shard(whole_state(), 2)  # type: ignore[arg-type]

    def test_what_cannot_be_done_says_what_to_do(self, mesh: DeviceMesh, tmp_path: Path):
        model, state = seeded(tiny_gpt2), distributed.shard(whole_state("nf4"), mesh)
        with pytest.raises(ValueError, match=r"distributed\.resample\(state, key\)"):
            rosa_func.resample(state, 1)
        with pytest.raises(ValueError, match="is sharded already"):
            distributed.shard(state, mesh)
        with pytest.raises(ValueError, match="a sharded state cannot be donated"):
            distributed.resample(state, 1, donate=True)
        with pytest.raises(ValueError, match=r"distributed\.gather\(state\)"):
            export.to_module(model, state)
        with pytest.raises(ValueError, match=r"distributed\.gather\(state\)"):
            rosa_func.quantised.merge_into_master(state)
        with pytest.raises(ValueError, match=r"distributed\.gather\(state\)"):
            rosa_func.keep_compensation(state, tmp_path)

    def test_a_compiler_is_refused(self, mesh: DeviceMesh):
        state = distributed.shard(rosa_func.init(two_layers(), 2), mesh)
        model = two_layers()
        said = "a compiler cannot follow its gathers|Observed exception"  # which is all of 2.6
        with pytest.raises(Exception, match=said):
            torch.compile(
                lambda x: rosa_func.call(model, state, x), fullgraph=True, backend="eager"
            )(randn(3, 6))
