"""Files: what comes back, what survives a kill, what is refused."""

import copy
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from cases import ANY_DTYPE, DTYPES
from models import randn, seeded
from optimizers import Quantised
from rosa_func import checkpoint
from rosa_func.files import container, nested
from rosa_func.weight.layout import leaves


def make_state(r: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> TensorDict:
    model = seeded(lambda: nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)))
    return rosa_func.init(model.to(dtype), r, train="*.bias", **options)


def identical(one: Any, other: Any) -> bool:
    """Compare values and types, nested; a NaN is a NaN, and -0.0 is -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, TensorDict):
        return one.batch_size == other.batch_size and identical(
            dict(one.items()), dict(other.items())
        )
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(identical(*pair) for pair in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, np.ndarray | np.generic):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return repr(one) == repr(other)
    return one == other


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=4)
)
tensors = st.builds(
    lambda shape, dtype: randn(1, *shape)[0].mul(9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.uint8]),
)
arrays = st.builds(
    lambda shape, dtype: randn(1, *shape)[0].mul(9).numpy().astype(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(
        ["<f4", ">f8", "f2", "c16", "?", "u2", "i8", "longdouble", "U5", "S4", "M8[s]"]
    ),
)
others = (
    arrays
    | arrays.filter(lambda array: array.size).map(lambda array: array.reshape(-1)[0])
    | st.lists(st.integers(0, 9), max_size=3).map(torch.Size)
    | st.text("ab/. ", max_size=5).map(Path)
)
keys = st.integers() | st.text(max_size=3) | st.booleans() | st.none() | st.tuples(st.integers())
values = st.recursive(
    scalars | tensors | others,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


class TestSaveAndLoad:
    @given(value=values)
    def test_nested_values_come_back_as_they_were(self, value: Any):
        text, flat = nested.flatten(value)
        assert identical(nested.unflatten(text, flat), value)

    @given(value=values, dtype=ANY_DTYPE, exact=st.sampled_from([True, None]))
    def test_a_file_holds_the_bits_of_the_state_and_of_the_extras(
        self, tmp_path_factory: pytest.TempPathFactory, value: Any, dtype: Any, exact: bool | None
    ):
        path = tmp_path_factory.mktemp("checkpoint") / "run.safetensors"
        state = make_state(dtype=dtype, exact=exact)
        checkpoint.save(path, state, value=value)
        loaded, extra = checkpoint.load(path)
        assert identical(loaded, state)
        assert extra.keys() == {"value"}
        assert identical(extra["value"], value)

    def test_the_states_of_random_generators_come_back(self, tmp_path: Path):
        """`np.random.get_state()` was refused, and numpy numbers, paths and shapes with it."""
        given = {
            "legacy": np.random.RandomState(3).get_state(),
            "named": np.random.RandomState(3).get_state(legacy=False),
            "numpy": np.random.default_rng(3).bit_generator.state,
            "python": random.Random(3).getstate(),
            "best": {np.int64(7): np.float64(0.5)},
            "where": [Path("runs") / "one", torch.Size([2, 3]), np.str_("")],
            "turned": np.arange(6.0).reshape(2, 3).T[::-1],
            "fixed": np.broadcast_to(np.float32(2), (3,)),
        }
        path = tmp_path / "run.safetensors"
        checkpoint.save(path, make_state(), **given)
        extra = checkpoint.load(path)[1]
        assert identical(extra, given)
        one, other = np.random.RandomState(), np.random.RandomState(3)
        one.set_state(extra["legacy"])
        assert one.randn() == other.randn()
        extra["turned"] += 1  # memory of its own, which can be written to

    def test_numbers_and_strings_of_a_subclass_come_back_as_plain_ones(self, tmp_path: Path):
        """`save(path, state, version=torch.__version__)` was a TypeError: it is no plain str."""

        class Mode(str, Enum):
            FAST = "fast"

        class Level(IntEnum):
            HIGH = 3

        class Rate(float):
            def __repr__(self) -> str:
                return "a rate"

        assert type(torch.__version__) is not str
        given = {
            "version": torch.__version__,
            "modes": [Mode.FAST, Level.HIGH, Rate(0.1), Rate("inf"), np.float64(0.1)],
            "best": {Mode.FAST: 1, Level.HIGH: 2},
        }
        path = tmp_path / "run.safetensors"
        checkpoint.save(path, make_state(), **given)
        plain = {
            "version": str(torch.__version__),
            "modes": ["fast", 3, 0.1, float("inf"), np.float64(0.1)],
            "best": {"fast": 1, 3: 2},
        }
        assert identical(checkpoint.load(path)[1], plain)

    def test_optimizer_and_scheduler_dicts_can_be_loaded_again(self, tmp_path: Path):
        state = make_state()
        groups = rosa_func.optim.groups(state, output={"lr": 0.1, "betas": (0.8, 0.9)})
        optimizer = torch.optim.Adam(groups, lr=1e-3)
        schedulers = [
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5]),
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        ]
        sum(leaf.square().sum() for leaf in leaves(state).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        given = {
            "optimizer": optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in schedulers],
            "random": torch.Generator().manual_seed(3).get_state(),
        }
        assert type(given["schedulers"][0]["milestones"]) is Counter  # type: ignore[index]
        expected = copy.deepcopy(given)
        checkpoint.save(tmp_path / "run.safetensors", state, **given)
        loaded, extra = checkpoint.load(tmp_path / "run.safetensors")
        assert identical(extra, expected)
        again = torch.optim.Adam(rosa_func.optim.groups(loaded))
        again.load_state_dict(extra["optimizer"])
        assert identical(again.state_dict(), expected["optimizer"])

    def test_a_loaded_state_trains_without_writing_to_its_file(self, tmp_path: Path):
        path = tmp_path / "run.safetensors"
        checkpoint.save(path, make_state())
        before = path.read_bytes()
        loaded, _ = checkpoint.load(path)
        for leaf in leaves(loaded).values():
            assert not leaf.requires_grad
            leaf.add_(1.0)
        assert path.read_bytes() == before
        checkpoint.save(path, loaded)
        assert identical(checkpoint.load(path)[0], loaded)

    def test_shared_and_strided_tensors_come_back(self, tmp_path: Path):
        path, whole = tmp_path / "run.safetensors", torch.arange(6.0).view(2, 3)
        extra = {"one": whole, "again": whole, "turned": whole.T, "row": whole[1], "1": 1, 1: 2}
        checkpoint.save(path, make_state(), extra=extra)
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("extra/")]
            assert sorted(names) == ["extra/one", "extra/row", "extra/turned"]
        loaded = checkpoint.load(path)[1]["extra"]
        assert identical({k: v for k, v in loaded.items()}, extra)
        assert loaded["one"] is loaded["again"]

    def test_a_conjugate_is_not_taken_for_the_tensor_whose_memory_it_shares(self, tmp_path: Path):
        """It came back as that tensor: the sign of its imaginary part was lost."""
        x = randn(3, 2).to(torch.complex64) * (1 + 2j)
        extra = {"x": x, "conjugate": x.conj(), "imag": x.imag, "negative": x.conj().imag}
        checkpoint.save(tmp_path / "run.safetensors", make_state(), **extra)
        loaded = checkpoint.load(tmp_path / "run.safetensors")[1]
        assert all(torch.equal(loaded[name], value) for name, value in extra.items())
        assert not torch.equal(loaded["imag"], loaded["negative"])

    def test_saved_tensors_have_names_that_other_readers_understand(self, tmp_path: Path):
        checkpoint.save(tmp_path / "run.safetensors", make_state())
        with safe_open(tmp_path / "run.safetensors", "pt") as file:
            assert "state/trainable/0.weight/A" in file.keys()


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
import rosa_func
from rosa_func import checkpoint

torch.set_num_threads(1)  # a forked process has none of its parent's threads
path, kills = sys.argv[1], int(sys.argv[2])
draw = random.Random(0)
model = torch.nn.Sequential(torch.nn.Linear(40, 30))
model.requires_grad_(False)
state = rosa_func.init(model, 2)


def save(number):
    state["frozen", "0.bias"] = torch.full((30,), float(number))
    checkpoint.save(path, state, number=number)


start = time.perf_counter()
save(0)
took = time.perf_counter() - start
seen, partial = [], 0
while len(seen) < kills or partial <= 10:
    ours, childs = os.pipe()
    child = os.fork()
    if child == 0:
        number = checkpoint.load(path)[1]["number"]
        while True:
            number += 1
            save(number)
            os.write(childs, b".")
    os.close(childs)
    # After no save, or after one or two, at any moment of the next: however fast the machine is.
    for _ in range(draw.randrange(3)):
        start = time.perf_counter()
        assert os.read(ours, 1)
        took = time.perf_counter() - start
    time.sleep(draw.uniform(0, 1.5 * took))
    os.kill(child, signal.SIGKILL)
    os.close(ours)
    os.waitpid(child, 0)
    loaded, extra = checkpoint.load(path)
    assert (loaded["frozen", "0.bias"] == extra["number"]).all(), extra
    seen.append(extra["number"])
    for name in os.listdir(os.path.dirname(path)):
        if name.endswith(".partial"):
            partial += 1
            os.unlink(os.path.join(os.path.dirname(path), name))
assert seen == sorted(seen)
print(len(seen), seen[-1], partial)
"""


class TestKilledSaves:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
    def test_a_kill_leaves_the_old_file_or_the_new_one(self, tmp_path: Path):
        path = str(tmp_path / "run.safetensors")
        command = [sys.executable, "-c", KILLED_WHILE_SAVING, path, "100"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        kills, saves, partial = map(int, done.stdout.split())
        # Children were killed while writing, and some after they had saved.
        assert kills >= 100
        assert saves > 80
        assert partial > 10

    def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        path = tmp_path / "run.safetensors"
        checkpoint.save(path, make_state(), step=1)

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(container, "_sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, make_state(), step=2)
        assert checkpoint.load(path)[1]["step"] == 1
        assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"
    model = nn.Sequential(nn.Linear(3, 2))
    checkpoint.save(path, rosa_func.init(model, 1), step=3)
    return path


class TestDamagedFiles:
    def test_every_truncation_is_an_error(self, path: Path):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"run\.safetensors"):
                checkpoint.load(path)

    def test_every_flipped_bit_is_an_error(self, path: Path):
        whole = path.read_bytes()
        for place in range(len(whole)):
            for bit in range(8):
                damaged = bytearray(whole)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"run\.safetensors"):
                    checkpoint.load(path)

    def test_files_that_save_did_not_write_are_refused(self, path: Path):
        save_file({"x": torch.ones(2)}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=r"not written by rosa_func.*has \['format'\]"):
            checkpoint.load(path)
        torch.save({"x": torch.ones(2)}, path)  # a pickle, under this name
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            checkpoint.load(path)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            checkpoint.load(path)
        with pytest.raises(FileNotFoundError, match="there is no file"):
            checkpoint.load(path.parent)
        with pytest.raises(FileNotFoundError, match=r"no folder .*none to write run\.safetensors"):
            checkpoint.save(path.parent / "none" / "run.safetensors", TensorDict())

    @pytest.mark.parametrize("change", ["version", "content", "missing tensor"])
    def test_files_with_wrong_metadata_are_refused(self, path: Path, change: str):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if change == "version":
            metadata["rosa_func"] = "2"
            message = "version '2' and this rosa_func reads version 1"
        elif change == "content":
            metadata["content"] = '{"dict": []}'
            message = "does not hold what its metadata says"
        else:
            del tensors["state/trainable/0.weight/A"]
            message = "does not hold what its metadata says: KeyError"
        del metadata["sha256"]
        metadata["sha256"] = nested.digest(metadata, tensors)
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message):
            checkpoint.load(path)


class TestSaveRefusals:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"a": [1, {2}]}, "extra/a/1 is of type set"),
            (torch.ones(2, device="meta"), "extra is a tensor without values"),
            ({"m": Quantised(torch.ones(2))}, "extra/m is of type Quantised"),
            (torch.ones(2).to_sparse(), "extra is a tensor without values"),
            (np.array([1, None]), "extra is of type ndarray"),
            (np.zeros(2, [("field", "f4")]), "extra is of type ndarray"),
            (np.zeros(2, [("field", "f4")])[0], "extra is of type void"),
            ([np.ma.array([1.0])], "extra/0 is of type MaskedArray"),
        ],
    )
    def test_what_cannot_be_saved_is_named_and_the_old_file_stays(
        self, path: Path, value: Any, message: str
    ):
        before = path.read_bytes()
        with pytest.raises(TypeError, match=message):
            checkpoint.save(path, make_state(), extra=value)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_save_refuses_a_state_that_is_not_a_tensordict(self, path: Path):
        with pytest.raises(TypeError, match="a state is a TensorDict, got dict"):
            checkpoint.save(path, {})  # type: ignore[arg-type]
