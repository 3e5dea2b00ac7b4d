"""Two processes of which one dies, is silent, fails or was given something else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import faults_worker
from forking import run_worker
from rosa_func import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")

QUICK = faults_worker.TIMEOUT / 2  # the end of a process is seen at once, not after the timeout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    run_worker(faults_worker.__file__, folder)
    return folder


def of_rank(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


class TestOneIsKilled:
    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_in_a_step_the_other_has_an_error_of_torch(self, folder: Path, where: str):
        found = of_rank(folder, where, 0)
        assert not (folder / f"{where}.1.json").exists()
        assert "Error" in found["said"]
        assert found["seconds"] < QUICK
        assert found["same bits"]

    @pytest.mark.parametrize("name", ["resample", "sending", "module"])
    def test_in_a_resample_the_other_is_told_and_keeps_its_state(self, folder: Path, name: str):
        """It had gloo's "Connection closed by peer" alone, and no word on what was going on."""
        found = of_rank(folder, name, 0)
        assert not (folder / f"{name}.1.json").exists()
        assert found["said"].startswith(
            "RuntimeError: could not resample on rank 0: another process is gone"
        )
        assert found["seconds"] < QUICK
        assert found["moved"] < 1e-6

    @pytest.mark.parametrize("name", ["resample", "sending"])
    def test_a_state_that_is_not_donated_keeps_its_bits(self, folder: Path, name: str):
        assert of_rank(folder, name, 0)["same bits"]

    @pytest.mark.parametrize("name", ["resample, donated", "sending, donated"])
    def test_a_state_that_is_donated_computes_the_same(self, folder: Path, name: str):
        found = of_rank(folder, name, 0)
        assert "another process is gone" in found["said"]
        assert found["moved"] < 1e-6

    @pytest.mark.parametrize(("name", "rank"), [("begin, first", 1), ("begin, other", 0)])
    def test_in_the_beginning_of_a_sparse_part(self, folder: Path, name: str, rank: int):
        found = of_rank(folder, name, rank)
        assert f"could not begin on rank {rank}: another process is gone" in found["said"]
        assert found["seconds"] < QUICK
        assert found["same bits"]

    def test_in_a_save_the_file_that_was_there_loads(self, folder: Path):
        found = of_rank(folder, "save", 1)
        assert "Error" in found["said"]
        state, extra = checkpoint.load(folder / "run.safetensors")
        assert extra == {"step": 1}
        assert checkpoint.digest(state) == checkpoint.digest(faults_worker.a_state())


def test_one_that_is_silent_is_waited_for_as_long_as_the_group_says(folder: Path):
    found = of_rank(folder, "silent", 0)
    assert "another process is gone, or did not answer" in found["said"]
    assert "init_process_group(timeout=...)" in found["said"]
    assert faults_worker.SILENT_FOR / 2 < found["seconds"] < 2 * faults_worker.SILENT_FOR
    assert found["same bits"]


DIFFERENT = {
    "resample, factors": "has trainable.1.weight.A float32 (6, 2) #",
    "resample, residual": "has frozen.2.weight float32 (6, 6) #",
    "resample, in full": "has trainable.0.bias float32 (6,) #",
    "resample, targets": "has frozen.1.weight float32",
    "resample, number": "has frozen.1.weight float32",
    "resample, rank": "has frozen.0.weight float32 (6, 6) #",
    "resample, dtype": "has frozen.0.weight float32",
    "resample, key": "has the key 0, and rank 1 has 1",
    "resample, sampler": "has the sampler projection, and rank 1 has random",
    "donated, factors": "has trainable.1.weight.A",
    "donated, residual": "has frozen.2.weight",
    "module, factors": "has trainable.1.weight.A",
    "module, residual": "has frozen.2.weight",
    "begin, factors": "has trainable.1.weight.A",
    "begin, residual": "has frozen.2.weight",
    "begin, start": "has start.trainable.1.weight.A",
    "begin, start in one": "has start.",
}
FAILING = {
    "resample, an entry is missing": "KeyError",
    "resample, a key's type": "TypeError",
    "begin, an entry is missing": "KeyError",
    "check_equal, meta": "NotImplementedError",
}


class TestTheyWereGivenSomethingElse:
    @pytest.mark.parametrize("case", DIFFERENT)
    def test_both_say_what_differs_before_anything_is_changed(self, folder: Path, case: str):
        """Each took the other's residual beside factors of its own, or one waited for ever."""
        both = [of_rank(folder, "disagreeing", rank)[case] for rank in range(2)]
        for found in both:
            assert found["said"].startswith("ValueError: could not ")
            assert DIFFERENT[case] in found["said"]
            assert found["same bits"]
        assert both[0]["said"] == both[1]["said"]

    @pytest.mark.parametrize("case", FAILING)
    def test_where_one_cannot_take_part_the_other_is_told_why(self, folder: Path, case: str):
        """What was no draw was not caught: the other process waited for half an hour."""
        told, failed = (of_rank(folder, "disagreeing", rank)[case] for rank in range(2))
        assert failed["said"].startswith(FAILING[case])
        assert told["said"].startswith("RuntimeError: rank 1 could not ")
        assert f"({FAILING[case]}" in told["said"]
        assert told["same bits"]
        assert failed["same bits"]

    def test_one_may_donate_where_the_other_does_not(self, folder: Path):
        hashes = {
            of_rank(folder, "donated in one", rank)[how]
            for rank in range(2)
            for how in ("together", "alone")
        }
        assert len(hashes) == 1


@pytest.mark.parametrize("how", ["fully_shard", "FSDP", "fully_shard, around"])
def test_sharding_by_others_is_refused_with_what_to_use(folder: Path, how: str):
    """It left the frozen weights whole; FSDP had a KeyError of 'A', a resample one of DTensor."""
    for rank in range(2):
        said = of_rank(folder, "sharded by others", rank)[how]
        assert "leave all that is frozen whole" in said
        assert "rosa_func.distributed.shard(state, mesh)" in said
