"""Progress of `init`, `init_from` and `resample`: told after each weight, by none by default."""

import sys
from typing import Any

import pytest

import rosa_func
from models import seeded, tiny_gpt2, two_layers
from references import global_state, state_bytes

NAMES = ["0.weight", "2.weight"]


class TestCallback:
    @pytest.mark.parametrize("donate", [False, True])
    def test_it_is_told_of_each_weight_in_order(self, donate):
        told: list[Any] = []
        options: Any = {"progress": lambda *seen: told.append(seen), "donate": donate}
        state = rosa_func.init(two_layers(), 2, **options)
        assert told == [(1, 2, "0.weight"), (2, 2, "2.weight")]
        new = rosa_func.resample(state, 1, **options)
        assert told[2:] == told[:2]
        pure = rosa_func.init(two_layers(), 2)
        assert state_bytes(new) == state_bytes(rosa_func.resample(pure, 1))

    def test_init_from_and_a_method_tell_too(self, tmp_path):
        seeded(tiny_gpt2).save_pretrained(tmp_path)
        told: list[Any] = []
        _, state = rosa_func.init_from(tmp_path, 2, progress=lambda *seen: told.append(seen))
        assert [done for done, _, _ in told] == list(range(1, 9))
        method = rosa_func.method(2, progress=lambda *seen: told.append(seen))
        method.resample(method.init(two_layers()), 1)
        assert [name for _, _, name in told[8:]] == NAMES * 2
        assert state_bytes(state) == state_bytes(rosa_func.init(seeded(tiny_gpt2), 2))

    @pytest.mark.parametrize("donate", [False, True])
    def test_its_exception_leaves_everything_as_it_was(self, donate):
        def stop(done: int, total: int, name: str) -> None:
            raise StopIteration(name)

        model, state = two_layers(), rosa_func.init(two_layers(), 2)
        weights, before = rosa_func.merge(state), (global_state()[-3:], state_bytes(state))
        with pytest.raises(StopIteration, match=r"0.weight"):
            rosa_func.init(model, 2, progress=stop, donate=donate)
        model(model[0].weight.new_ones(1, 6))
        with pytest.raises(StopIteration, match=r"0.weight"):
            rosa_func.resample(state, 1, progress=stop, donate=donate)
        if not donate:
            assert (global_state()[-3:], state_bytes(state)) == before
        merged = rosa_func.merge(state)
        assert all(W.allclose(merged[name], atol=1e-6) for name, W in weights.items())

    @pytest.mark.parametrize("progress", ["yes", 1, None])
    def test_what_is_none_is_refused(self, progress, tmp_path):
        message = "progress is True, False or a function of"
        state = rosa_func.init(two_layers(), 2)
        for refused in (
            lambda: rosa_func.init(two_layers(), 2, progress=progress),
            lambda: rosa_func.init_from(tmp_path, 2, progress=progress),
            lambda: rosa_func.resample(state, 1, progress=progress),
        ):
            with pytest.raises(TypeError, match=message):
                refused()


class TestBar:
    def test_it_is_shown_when_asked_for(self, capsys):
        state = rosa_func.init(two_layers(), 2)
        rosa_func.resample(state, 1)
        assert capsys.readouterr().err == ""
        rosa_func.resample(state, 1, progress=True)
        assert "2/2" in capsys.readouterr().err

    def test_without_tqdm_the_error_names_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        model = two_layers()
        with pytest.raises(ModuleNotFoundError, match=r"rosa-func\[examples\]"):
            rosa_func.init(model, 2, progress=True)
        rosa_func.init(model, 2)
