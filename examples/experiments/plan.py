"""What an experiment is: a TOML file, the methods in it, and the cells that follow from them.

A cell is one training run. Its key is a digest of all that decides its result, so a cell that was
run is known again, and a changed file runs only what changed.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from rosa_func.weight.quantised import QUANTISED

FOLDER = Path(__file__).parent
SPECS = FOLDER / "specs"  # a TOML file for each experiment
RESULTS = FOLDER / "results"  # the published lines
COST_STEPS = 20  # that are timed


class Method(NamedTuple):
    """How the weights are adapted; every field but the name decides the result."""

    name: str
    sampler: str  # of rosa_func.samplers or draws.py, or "full"
    rank: int = 0  # of each weight; 0 for full
    every: int = 0  # steps of the first cycle; 0 for one draw
    growth: float = 1.0  # each cycle is that many times as long as the one before
    moments: str = "reset"  # at a resample, as in rosa_func.optim.rebind
    rewarm: int = 0  # steps of warm-up after each resample
    train: str = (
        "both"  # or one side of the factors, "input" or "output"; of full, "matrices" alone
    )
    share: float = 0.5  # the power of each singular value that goes to the input side
    ratio: float = 1.0  # rate of the output side over that of the input side
    solve: bool = False  # each cycle by its exact minimum (linear regression only)
    length: float = 1.0  # of a published run, as a multiple of the setting's steps
    budget: int = 0  # train as many values as factors of that rank: what those of `rank` leave is
    # sparse, of one density in all weights; 0 for factors alone
    support: str = "gradient"  # where the sparse values are: its largest squares, or "random"
    begin: int = 0  # steps of the factors alone, before the support is chosen
    restart: bool = False  # from the first weights and factors, once it is
    values: float = 1.0  # rate of the sparse values over that of the input side
    quantize: str = ""  # how residuals are stored, as in rosa_func.init; "" for as they are
    master: bool = False  # keep what quantising takes, for resamples

    @property
    def label(self) -> str:
        """Return the name with the rank and the length, where there is one."""
        length = "" if self.length in (0, 1) else f", {self.length:g} x steps"
        return f"{self.name}{f' r={self.rank}' if self.rank else ''}{length}"

    @property
    def timed(self) -> "Method":
        """Return what is timed in its place: all that it trains, from the first step on."""
        return self._replace(length=1.0, begin=0, restart=False)


FULL = Method("full", "full")


class Cell(NamedTuple):
    """One run: everything that its result depends on."""

    setting: dict[str, Any]  # the task, the model, the schedule: equal for all methods
    method: Method
    rate: float
    seed: int
    phase: str  # "tune", "final" or "cost"

    @property
    def steps(self) -> int:
        """Return how many steps the run takes."""
        if self.phase != "final":
            return self.setting["tune_steps"] if self.phase == "tune" else COST_STEPS
        return round(self.setting["steps"] * self.method.length)

    @property
    def key(self) -> str:
        """Return a digest of all that decides the result."""
        # Without what is at its default, so that a new field leaves old keys as they are.
        defaults = Method._field_defaults
        method = {k: v for k, v in self.method._asdict().items() if v != defaults.get(k)}
        del method["name"]
        decided = [self.setting, method, self.rate, self.seed, self.phase]
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


class Experiment(NamedTuple):
    """A parsed file; `rates` is one grid for all methods."""

    name: str
    title: str
    setting: dict[str, Any]
    rates: list[float]
    seeds: list[int]
    tune_seed: int
    methods: list[Method]
    start: dict[Method, float]  # where the search for the rate begins
    like: dict[Method, Method]  # the method whose rate is taken over without a search,
    times: dict[Method, float]  # times that factor; 1 for a method that is not here
    figures: list[dict[str, Any]]
    compare: tuple[str, ...] = ("LoRA",)  # names of the methods that the others are compared with
    rounds: int = 3  # in which each method has its turn to be timed


def names(folder: Path = SPECS) -> list[str]:
    """Return the names of the experiments."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(name: str, folder: Path = SPECS) -> Experiment:
    """Read an experiment from its file."""
    path = folder / f"{name}.toml"
    if not path.is_file():
        raise SystemExit(f"there is no experiment {name!r}; there are {', '.join(names(folder))}")
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    setting, rates = content["setting"], content.get("rates", [1.0])
    if isinstance(setting, str):  # that of another experiment, whose cells then are the same
        other = load(setting, folder)
        setting, rates = other.setting, other.rates
    methods, start, like, times = [], {}, {}, {}
    for entry in content["method"]:
        others = ("ranks", "start", "like", "times")
        options = {k: v for k, v in entry.items() if k not in others}
        if unknown := options.keys() - set(Method._fields):
            raise SystemExit(f"{path}: a method has no {min(unknown)!r}, only {Method._fields}")
        for rank in entry.get("ranks", [0]):
            method = Method(**options, rank=rank)
            methods.append(method)
            start[method] = entry.get("start", rates[len(rates) // 2])
            if method.support not in ("gradient", "random") or 0 < method.budget <= rank:
                raise SystemExit(
                    f"{path}: {method.label} has a support by {method.support!r} and a budget of "
                    f"{method.budget}: it is by 'gradient' or 'random', the budget above the rank"
                )
            if (method.quantize or method.master) and (problem := _stored_wrongly(method)):
                raise SystemExit(f"{path}: {method.label} {problem}")
            if start[method] not in rates:
                raise SystemExit(f"{path}: {method.label} starts at a rate beside {rates}")
            if "times" in entry and "like" not in entry:
                raise SystemExit(f"{path}: {method.label} has `times`, but is `like` no method")
            if "like" in entry:
                of = [m for m in methods if m.name == entry["like"] and m.rank in (rank, 0)]
                if not of:
                    raise SystemExit(f"{path}: {method.label} is like {entry['like']!r}: not above")
                like[method], times[method] = of[0], entry.get("times", 1.0)
    if len({m.label for m in methods}) < len(methods):
        raise SystemExit(f"{path}: two methods have one name")
    if unknown := set(content.get("compare", [])) - {m.name for m in methods}:
        raise SystemExit(f"{path}: {min(unknown)!r}, to compare with, is no method of the file")
    return Experiment(
        name=name,
        title=content["title"],
        setting=setting,
        rates=sorted(rates),
        seeds=content["seeds"],
        tune_seed=content.get("tune_seed", 1000),
        methods=methods,
        start=start,
        like=like,
        times=times,
        figures=content.get("figure", []),
        compare=tuple(content.get("compare", ["LoRA"])),
    )


def with_model(experiment: Experiment, model: str) -> Experiment:
    """Return the experiment with another model, under a name of its own."""
    if "model" not in experiment.setting:
        raise SystemExit(f"--model {model}: {experiment.name} takes no model")
    return experiment._replace(
        name=f"{experiment.name}-{model.strip('/').replace('/', '-')}",
        title=f"{experiment.title}: with {model} in its place",
        setting={**experiment.setting, "model": model},
    )


def _stored_wrongly(method: Method) -> str | None:
    """Say what does not go together in how the residuals of a method are stored."""
    if not method.quantize:
        return "has a master, and is not quantised"
    if method.quantize not in QUANTISED or method.sampler == "full":
        return f"is quantised by {method.quantize!r}: it is by {', '.join(QUANTISED)}, not full"
    if method.every and not method.master and method.sampler not in ("additive", "lora"):
        return "is quantised without a master, so its resamples are by additive or lora"
    return None


def best_rate(experiment: Experiment, method: Method, scores: dict[str, float]) -> float | None:
    """Return the best rate of a method by dev, or None as long as cells of the search are missing.

    Where the grid has one rate there is nothing to search.
    """
    if method in experiment.like:
        of = best_rate(experiment, experiment.like[method], scores)
        return None if of is None else of * experiment.times.get(method, 1.0)
    if len(experiment.rates) == 1:
        return experiment.rates[0]
    tried, missing = walk(experiment, method, scores)
    return None if missing else min(tried, key=lambda cell: scores[cell.key]).rate


def tuning(experiment: Experiment, method: Method) -> list[Cell]:
    """Return the cells of the whole grid of one method, of one length for all of its lengths."""
    usual = method._replace(length=1.0)
    return [
        Cell(experiment.setting, usual, rate, experiment.tune_seed, "tune")
        for rate in experiment.rates
    ]


def walk(
    experiment: Experiment, method: Method, scores: dict[str, float]
) -> tuple[list[Cell], list[Cell]]:
    """Return the cells of the search for a rate that were run, and those to be run next.

    From its start and the two beside it the search goes on until the best rate has a worse one on
    either side, or the grid ends: then none is to be run. Which cells it takes depends on their
    scores alone, not on the order in which they end. Scores are losses on dev, by key; a run
    that diverged has inf.
    """
    cells = tuning(experiment, method)
    at = experiment.rates.index(experiment.start[method])
    tried: list[Cell] = []
    while True:
        beside = [cell for cell in cells[max(0, at - 1) : at + 2] if cell not in tried]
        missing = [cell for cell in beside if cell.key not in scores]
        if missing or not beside:
            return tried, missing
        tried += beside
        at = cells.index(min(tried, key=lambda cell: scores[cell.key]))


def due(experiment: Experiment, scores: dict[str, float]) -> list[Cell]:
    """Return the cells that can be run now: those of the searches, the published ones, the costs.

    The costs come last and when nothing else is due, so that they are measured alone.
    """
    searched = [m for m in experiment.methods if m not in experiment.like]
    tune = [
        c for m in searched if len(experiment.rates) > 1 for c in walk(experiment, m, scores)[1]
    ]
    cells = {cell.key: cell for cell in [*tune, *finals(experiment, scores)]}  # each once
    left = [cell for key, cell in cells.items() if key not in scores]
    return left or [cell for cell in costs(experiment) if cell.key not in scores]


def done(experiment: Experiment, scores: dict[str, float]) -> list[Cell]:
    """Return the cells that were run, of the searches, the published ones and the costs."""
    searched = [m for m in experiment.methods if m not in experiment.like]
    tune = [cell for method in searched for cell in tuning(experiment, method)]
    cells = [*tune, *finals(experiment, scores), *costs(experiment)]
    return [cell for key, cell in {c.key: c for c in cells}.items() if key in scores]


def finals(experiment: Experiment, scores: dict[str, float]) -> list[Cell]:
    """Return the published cells of the methods whose rate is known, one seed after the other."""
    rates = {m: best_rate(experiment, m, scores) for m in experiment.methods}
    return [
        Cell(experiment.setting, method, rate, seed, "final")
        for seed in experiment.seeds
        for method, rate in rates.items()
        if rate is not None
    ]


def costs(experiment: Experiment) -> list[Cell]:
    """Return the cells that measure time and memory: methods that take steps, in turn, in rounds.

    Their seed is the round. Full fine-tuning is among them, for it is what times are told by. They
    are the file's own: with another method beside them they are other cells, timed together.
    """
    methods = [m.timed for m in experiment.methods if m.length and not m.solve]
    if not methods:
        return []
    methods = list(dict.fromkeys([FULL, *methods]))
    setting = {**experiment.setting, "in_turn": [method.label for method in methods]}
    return [
        Cell(setting, method, 0.0, round, "cost")
        for round in range(experiment.rounds)
        for method in methods
    ]
