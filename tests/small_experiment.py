"""An experiment of a few methods, for the tests of the harness."""

from typing import Any

from examples.experiments import plan

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
METHODS = [
    plan.Method("full", "full"),
    plan.Method("LoRA", "lora", rank=2),
    plan.Method("ROSA", "random", rank=2, every=3),
    plan.Method("aligned", "aligned", rank=2, every=3, moments="keep", train="output"),
    plan.Method("importance", "importance", rank=2, every=2, growth=2.0, moments="project"),
    plan.Method("all to the input", "random", rank=2, every=3, share=1.0, rewarm=2),
]
SETTING = {"steps": 7, "tune_steps": 3, "warmup": 2, "eval_every": 3}


def experiment(**changes: Any) -> plan.Experiment:
    start = dict.fromkeys(METHODS, RATES[2])
    parts = {"name": "x", "title": "", "setting": SETTING, "rates": RATES, "seeds": [0, 1]}
    parts |= {
        "tune_seed": 9,
        "methods": METHODS,
        "start": start,
        "like": {},
        "times": {},
        "figures": [],
    }
    return plan.Experiment(**(parts | changes))
