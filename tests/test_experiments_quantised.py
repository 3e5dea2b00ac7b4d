"""Quantised residuals in the harness."""

from itertools import islice

import pytest

import rosa_func
from examples.experiments import adapting, plan
from rosa_func.weight import read
from small_experiment import SETTING, RecordingTask

RESAMPLED = plan.Method("nf4", "random", rank=2, every=3, quantize="nf4", master=True)
ADDED = plan.Method("nf4, added", "additive", rank=2, every=3, quantize="nf4")


@pytest.mark.parametrize("method", [RESAMPLED, ADDED], ids=str)
def test_a_method_trains_and_resamples_quantised_residuals(method: plan.Method):
    made = RecordingTask().load()
    run = adapting.Adaptation(made, plan.Cell(SETTING, method, 1e-2, 3, "final"))
    for step, batch in enumerate(islice(made.batches(3), 6)):
        if step == 3:
            run.resample(step)
        run.train(batch, 1e-2)
    weights = read(run.state).adapted().values()
    assert all(w.base.coarse and (w.lost is not None) == method.master for w in weights)
    assert ("fixed" in run.state.keys()) == (method is ADDED)
    assert rosa_func.count(run.state).trainable == run.trainable


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('quantize = "fp4"', "by 'fp4': it is by nf4, nf4_double, int8"),
        ("master = true", "has a master, and is not quantised"),
        ('quantize = "nf4"\nevery = 3', "without a master, so its resamples are by"),
    ],
)
def test_what_cannot_be_is_refused_when_the_file_is_read(line: str, match: str, tmp_path):
    text = """
title = "x"
rates = [1e-3]
seeds = [0]
tune_seed = 9

[setting]
steps = 7

[[method]]
name = "ROSA"
sampler = "random"
ranks = [2]
"""
    (tmp_path / "x.toml").write_text(text + line)
    with pytest.raises(SystemExit, match=match):
        plan.load("x", tmp_path)
