"""The plan of an experiment: its search for rates, its cells and their keys."""

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.experiments import adapting, plan
from small_experiment import METHODS, RATES, SETTING, experiment


class TestSearch:
    @given(
        st.integers(0, 5), st.integers(0, 5), st.lists(st.floats(0.01, 1), min_size=6, max_size=6)
    )
    def test_the_search_ends_at_the_best_rate_of_a_loss_with_one_minimum(self, best, start, gaps):
        method = METHODS[1]
        e = experiment(start={method: RATES[start]})
        cells = plan.tuning(e, method)
        losses = {c.key: sum(gaps[min(i, best) : max(i, best)], 0.0) for i, c in enumerate(cells)}
        scores: dict[str, float] = {}
        for _ in range(6):
            _, missing = plan.walk(e, method, scores)
            assert not {cell.key for cell in missing} & scores.keys()
            scores |= {cell.key: losses[cell.key] for cell in missing}
        assert not plan.walk(e, method, scores)[1]
        assert plan.best_rate(e, method, scores) == RATES[best]

    def test_a_diverged_run_is_never_the_best(self):
        method = METHODS[1]
        losses = [1.0, 0.5, math.inf, math.inf, math.inf, math.inf]
        keys = [cell.key for cell in plan.tuning(experiment(), method)]
        assert (
            plan.best_rate(experiment(), method, dict(zip(keys, losses, strict=True))) == RATES[1]
        )

    def test_published_seeds_wait_for_the_rate(self):
        e = experiment(methods=METHODS[1:3], like={METHODS[2]: METHODS[1]})
        assert {cell.phase for cell in plan.due(e, {})} == {"tune"}
        keys = [cell.key for cell in plan.tuning(e, METHODS[1])]
        scores = dict(zip(keys, [3.0, 2.0, 1.0, 2.0, 3.0, 4.0], strict=True))
        due = plan.due(e, scores)
        assert [(c.method.name, c.seed, c.rate) for c in due] == [
            ("LoRA", 0, RATES[2]),
            ("ROSA", 0, RATES[2]),  # that of LoRA, by `like`
            ("LoRA", 1, RATES[2]),
            ("ROSA", 1, RATES[2]),
        ]

    def test_a_rate_can_be_that_of_another_method_times_a_factor(self):
        like, times = {METHODS[2]: METHODS[1]}, {METHODS[2]: 0.5}
        e = experiment(methods=METHODS[1:3], like=like, times=times)
        keys = [cell.key for cell in plan.tuning(e, METHODS[1])]
        scores = dict(zip(keys, [3.0, 2.0, 1.0, 2.0, 3.0, 4.0], strict=True))
        assert plan.best_rate(e, METHODS[1], scores) == RATES[2]
        assert plan.best_rate(e, METHODS[2], scores) == RATES[1]  # the one below it in the grid

    def test_the_costs_come_when_nothing_else_is_due(self):
        e = experiment(rates=[1e-3], seeds=[0], methods=METHODS[1:3])
        scores = {cell.key: 1.0 for cell in plan.due(e, {})}
        due = [(c.method.name, c.phase, c.seed) for c in plan.due(e, scores)]
        turns = range(e.rounds)
        names = ("full", "LoRA", "ROSA")  # the first is not in the file
        assert due == [(name, "cost", turn) for turn in turns for name in names]

    def test_the_costs_of_other_methods_beside_are_other_cells(self):
        e = experiment()
        keys = {cell.key for cell in plan.costs(e)}
        assert keys.isdisjoint(cell.key for cell in plan.costs(e._replace(methods=METHODS[:-1])))
        timed = {method.timed._replace(name="") for method in METHODS}  # a restart costs nothing
        assert len(keys) == e.rounds * len(timed)  # full, which is there, not twice

    def test_methods_that_take_no_steps_have_no_costs(self):
        assert not plan.costs(experiment(methods=[METHODS[1]._replace(solve=True)]))

    def test_lengths_of_one_method_share_one_search_whose_cells_are_due_once(self):
        methods = [METHODS[1], METHODS[1]._replace(length=2.0)]
        due = plan.due(experiment(methods=methods, start=dict.fromkeys(methods, RATES[2])), {})
        assert [(c.rate, c.steps) for c in due] == [(rate, 3) for rate in RATES[1:4]]

    def test_the_key_of_a_cell_depends_on_what_decides_the_result_and_on_nothing_else(self):
        cell = plan.Cell(SETTING, METHODS[2], 1e-3, 0, "final")
        assert cell._replace(method=METHODS[2]._replace(name="other")).key == cell.key
        others = [
            cell._replace(setting={**SETTING, "steps": 8}),
            cell._replace(method=METHODS[2]._replace(every=4)),
            cell._replace(rate=2e-3),
            cell._replace(seed=1),
            cell._replace(phase="tune"),
        ]
        assert len({c.key for c in [cell, *others]}) == 6


class TestFiles:
    @pytest.mark.parametrize("name", plan.names())
    def test_every_file_is_an_experiment(self, name):
        e = plan.load(name)
        assert len(e.methods) == len({method.label for method in e.methods})
        assert {"task", "rows", "batch", "warmup", "eval_every"} <= e.setting.keys()

    def test_a_missing_method_to_compare_with_is_named(self, tmp_path):
        for name in ("e2e", "moments"):
            shutil.copy(plan.SPECS / f"{name}.toml", tmp_path)
        assert plan.load("moments", tmp_path).compare == ("reset",)
        file = tmp_path / "moments.toml"
        file.write_text(file.read_text(encoding="utf-8").replace('["reset"]', '["rest"]'))
        with pytest.raises(SystemExit, match="'rest', to compare with"):
            plan.load("moments", tmp_path)

    def test_a_factor_of_a_rate_needs_a_method_to_take_the_rate_from(self, tmp_path):
        text = (plan.SPECS / "theorem.toml").read_text(encoding="utf-8")
        (tmp_path / "x.toml").write_text(text.replace("ranks =", "times = 0.5\nranks =", 1))
        with pytest.raises(SystemExit, match="has `times`, but is `like` no method"):
            plan.load("x", tmp_path)

    def test_another_model_has_cells_and_a_name_of_its_own(self):
        usual = plan.load("glue-cola")
        other = plan.with_model(usual, "FacebookAI/roberta-base")
        assert other.name == "glue-cola-FacebookAI-roberta-base"
        assert other.setting == {**usual.setting, "model": "FacebookAI/roberta-base"}
        keys = [{cell.key for cell in plan.due(e, {})} for e in (usual, other)]
        assert not keys[0] & keys[1]
        with pytest.raises(SystemExit, match="theorem takes no model"):
            plan.with_model(plan.load("theorem"), "minilm")

    def test_every_search_for_a_rate_sees_a_resample(self):
        """At least a third of the steps come after it: a rate must not suit one draw alone."""
        for name in plan.names():
            e = plan.load(name)
            steps = e.setting.get("tune_steps", 0)
            for method in e.methods if len(e.rates) > 1 else []:
                if method.every and method not in e.like:
                    assert next(adapting.cycle_starts(method, steps), steps) <= steps * 2 / 3, name
