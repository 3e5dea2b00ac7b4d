"""Two processes and one: the same gradients, the same weights, half the decompositions each."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddp_worker
import rosa_func
from forking import run_worker
from references import state_bytes
from rosa_func import distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not hasattr(os, "fork"):
        pytest.skip("the processes are forked")
    folder = tmp_path_factory.mktemp("ddp")
    errors = run_worker(ddp_worker.__file__, folder)
    assert all((folder / f"{rank}.pt").exists() for rank in range(2)), errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return ddp_worker.train(0, 1)


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float((difference / sum(t.double().square().sum() for t in other.values())).sqrt())


class TestTwoProcesses:
    def test_gradients_of_two_processes_are_those_of_one(
        self, processes: Any, alone: dict[str, Any]
    ):
        for process in processes:
            assert relative_difference(process["gradients"], alone["gradients"]) < 1e-6

    def test_weights_of_two_processes_after_a_resample_are_those_of_one(
        self, processes: Any, alone: dict[str, Any]
    ):
        for process in processes:
            assert relative_difference(process["weights"], alone["weights"]) < 1e-5

    def test_both_processes_hold_the_same_bits(self, processes: Any):
        assert processes[0]["hashes"] == processes[1]["hashes"]
        assert len(set(processes[0]["hashes"])) == ddp_worker.STEPS + 1

    def test_each_weight_is_decomposed_by_one_process(self, processes: Any, alone: Any):
        one, other = (process["decomposed"] for process in processes)
        assert sorted(one + other) == sorted(alone["decomposed"])
        assert abs(len(one) - len(other)) <= 1

    def test_two_processes_draw_what_one_draws(self, processes: Any, alone: dict[str, Any]):
        """The residuals differ by rounding alone, so the same indices were drawn."""
        for process in processes:
            assert relative_difference(process["R"], alone["R"]) < 1e-4

    def test_processes_send_each_other_parts_that_the_library_does_not_know(self, processes: Any):
        for process in processes:
            together, alone, donated = process["of_other_parts"]
            assert together == alone == donated

    def test_processes_send_each_other_quantised_residuals(self, processes: Any):
        """With a master, and with past products, of which there are more after a draw."""
        for process in processes:
            for together, alone, donated in process["quantised"]:
                assert together == alone == donated

    @pytest.mark.parametrize("how", ["failing", "failing, donated"])
    def test_a_failed_draw_in_one_process_is_raised_in_both(self, processes: Any, how: str):
        said, moved = processes[0][how]
        assert said.startswith("RuntimeError: rank 1 could not resample (ValueError: no draw of ")
        assert said.endswith("; this is rank 0")
        assert moved < 1e-6  # the state can be used, though half of it is drawn again
        said, moved = processes[1][how]
        assert said.startswith("ValueError: no draw of ")
        assert moved == 0

    def test_a_state_that_one_process_shares_is_donated_by_none(self, processes: Any):
        assert processes[0]["shared in one"].startswith("ValueError: 0.weight is in another state")
        assert processes[1]["shared in one"].startswith(
            "RuntimeError: rank 0 could not resample (ValueError: 0.weight is in another state"
        )

    def test_a_tensor_in_full_that_is_not_finite_is_refused_as_by_resample(self, processes: Any):
        for process in processes:
            assert process["not_finite"].startswith("ValueError: 0.bias: non-finite values")

    def test_what_lives_on_the_host_is_not_sent(self, processes: Any):
        """NCCL sends what is on a GPU; the dimensions of inputs are integers on the host."""
        for process in processes:
            assert process["sent"] == ["torch.bfloat16", "torch.float32", "torch.float64"]

    def test_a_support_is_found_by_the_first_process_and_sent_as_places(self, processes: Any):
        """Masks that each process found from its own gradients differed."""
        for rank, process in enumerate(processes):
            begun = process["begun"]
            assert begun["together"] == begun["alone"]
            assert begun["looked_at"] == ([] if rank else [0, 0])
            assert begun["dtypes"] == ["torch.int32"]
        assert processes[0]["begun"]["failure"].startswith("ValueError: batches is empty")
        assert processes[1]["begun"]["failure"].startswith(
            "RuntimeError: rank 0 could not begin (ValueError: batches is empty"
        )

    def test_check_equal_notices_different_states(self, processes: Any):
        assert all("different states" in process["unequal"] for process in processes)


def test_distributed_resample_without_processes_is_resample():
    state = rosa_func.init(nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)), 2)
    new = distributed.resample(state, 3)
    assert state_bytes(new) == state_bytes(rosa_func.resample(state, 3))
    assert distributed.check_equal(new) != distributed.check_equal(state)
