"""The package from outside: what an import brings, missing extras, and what newcomers pass."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import rosa_func
from models import seeded
from rosa_func import checkpoint, export, peft_names

ROOMS = [
    *("checkpoint", "distributed", "export", "module", "optim", "samplers", "stacking", "trainer"),
]

# Prints the modules that the package adds to its requirements, and what its rooms are.
IMPORTS = """
import json, sys, torch, tensordict
before = set(sys.modules)
import rosa_func
new = sorted(set(sys.modules) - before)
listed = dir(rosa_func)
rooms = {name: getattr(rosa_func, name).__name__ for name in sys.argv[1:]}
print(json.dumps([new, listed, rooms]))
"""


def linear() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 4)))


class TestImports:
    def test_an_import_is_light_and_a_room_comes_when_it_is_asked_for(self):
        """`rosa_func.trainer` was an AttributeError; all other rooms came with each import."""
        ran = subprocess.run(
            [sys.executable, "-c", IMPORTS, *ROOMS], check=True, capture_output=True, text=True
        )
        new, listed, rooms = json.loads(ran.stdout)
        packages = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
        assert packages == {"rosa_func"}
        late = {f"rosa_func.{room}" for room in ROOMS if room != "samplers"}
        assert not late & set(new)
        assert rooms == {room: f"rosa_func.{room}" for room in ROOMS}
        assert set(rosa_func.__all__) <= set(listed)

    def test_a_name_that_is_not_there_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'rosa_func' has no attribute 'trainers'"):
            rosa_func.trainers  # noqa: B018


def save(folder: Path) -> None:
    checkpoint.save(folder / "state.safetensors", rosa_func.init(linear(), 2))


def load(folder: Path) -> None:
    checkpoint.load(folder / "state.safetensors")


def to_peft(folder: Path) -> None:
    export.to_peft(folder, linear(), rosa_func.init(linear(), 2))


def from_peft(folder: Path) -> None:
    export.from_peft(linear(), folder)


def init_from(folder: Path) -> None:
    rosa_func.init_from(folder, 2)


def trainer(folder: Path) -> None:
    importlib.import_module("rosa_func.trainer")


class TestExtras:
    @pytest.mark.parametrize(
        ("use", "missing", "extra"),
        [
            (save, "safetensors", "checkpoint"),
            (load, "safetensors", "checkpoint"),
            (to_peft, "safetensors", "checkpoint"),
            (from_peft, "safetensors", "checkpoint"),
            (init_from, "safetensors", "trainer"),
            (init_from, "transformers", "trainer"),
            (trainer, "transformers", "trainer"),
            (trainer, "accelerate", "trainer"),
        ],
    )
    def test_a_missing_package_names_the_extra_that_brings_it(
        self,
        use: Callable[[Path], None],
        missing: str,
        extra: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ):
        """`checkpoint.save` gave "No module named 'safetensors'", and nothing else."""
        save(tmp_path)
        (tmp_path / "state.safetensors").rename(tmp_path / "model.safetensors")
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name).write_text(json.dumps(config))
        for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, "rosa_func.trainer", raising=False)
        with pytest.raises(ModuleNotFoundError, match=missing) as caught:
            use(tmp_path)
        assert str(caught.value).endswith(f'pip install "rosa-func[{extra}]"')
        assert caught.value.name is not None
        assert caught.value.name.partition(".")[0] == missing


class TestArgumentsOfPeft:
    @pytest.mark.parametrize("name", sorted(peft_names._HERE))
    def test_an_argument_of_peft_is_answered_with_what_says_the_same_here(
        self, name: str, tmp_path: Path
    ):
        """`init(model, rank=8)` gave "unexpected keyword argument 'rank'", not what ours is."""
        given: dict[str, Any] = {name: 8}
        for use in (
            lambda: rosa_func.init(linear(), 2, **given),
            lambda: rosa_func.init_from(tmp_path, 2, **given),
            lambda: rosa_func.resample(rosa_func.init(linear(), 2), 1, **given),
            lambda: rosa_func.method(2, **given),
            lambda: rosa_func.method(2).init(linear(), **given),
        ):
            with pytest.raises(TypeError, match=rf"argument '{name}': .*(r|=)"):
                use()

    def test_a_rank_is_r(self):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'rank': .* r=8"):
            rosa_func.init(linear(), rank=8)  # type: ignore[arg-type]

    def test_any_other_argument_is_refused_as_by_python(self):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'ranks'$"):
            rosa_func.init(linear(), ranks=8)  # type: ignore[arg-type]
