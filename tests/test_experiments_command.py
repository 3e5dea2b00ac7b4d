"""The command line: what is refused, and what is said where there is nothing to do."""

import sys
from collections.abc import Callable

import pytest

from examples.experiments import __main__ as command
from examples.experiments import needs, plan, records, runner
from examples.experiments import tiny as small
from small_experiment import METHODS, RATES, experiment


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the experiments that would run; none of them does."""
    names: list[str] = []
    monkeypatch.setattr(runner, "run", lambda experiment, *_: names.append(experiment.name))
    return names


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return the command as a function of its arguments."""

    def called(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
        command.main()

    return called


class TestData:
    @pytest.mark.parametrize("name", ["glue-cola", "smollm2", "e2e", "eli5", "code", "theorem"])
    def test_a_missing_data_folder_is_refused_before_anything_starts(
        self, call, started, tmp_path, name
    ):
        folder = tmp_path / "nowhere"
        with pytest.raises(SystemExit) as refused:
            call("run", name, "--data", folder, "--results", tmp_path)
        first, *others = str(refused.value).splitlines()
        assert first == f"--data {folder}: there is no such folder; expected:"
        assert len(others) == len(needs.files(plan.load(name).setting))
        assert not started

    def test_all_files_that_are_missing_are_named_with_their_experiment_and_use(
        self, call, started, tmp_path
    ):
        small.make(tmp_path)
        (tmp_path / "eli5" / "train.jsonl").unlink()
        (tmp_path / "glue" / "CoLA" / "dev.jsonl").unlink()
        names = ["theorem", "e2e", "smollm2", "glue-cola"]
        with pytest.raises(SystemExit) as refused:
            call("run", *names, "--data", tmp_path, "--results", tmp_path)
        assert str(refused.value).splitlines() == [
            f"--data {tmp_path}: there is no",
            f"  {tmp_path}/eli5/train.jsonl (e2e: its base model, prose, is trained on it)",
            f"  {tmp_path}/glue/CoLA/dev.jsonl (glue-cola: its data)",
        ]
        assert not started
        call("run", "smollm2", "--data", tmp_path, "--results", tmp_path)
        assert started == ["smollm2"]

    def test_what_the_hub_lacks_needs_a_folder(self, call, started, tmp_path):
        with pytest.raises(SystemExit, match=r"gsm8k/train.jsonl \(eli5: its base model, docs"):
            call("run", "e2e", "eli5", "--results", tmp_path)
        assert not started

    @pytest.mark.parametrize("name", plan.names())
    def test_the_files_of_every_experiment_are_among_those_of_the_tiny_mode(self, name, tmp_path):
        small.make(tmp_path)
        needs.check([plan.load(name)], tmp_path)


class TestNothingDue:
    def test_published_experiments_say_so_and_ask_for_no_data(self, call, started, capsys):
        call("run", "e2e", "theorem")
        folder, lines = plan.RESULTS, capsys.readouterr().out.splitlines()
        assert [line.partition(" all ")[0] for line in lines] == [
            f"{name}: nothing is due," for name in ("e2e", "theorem")
        ]
        assert all(f" cells are in {folder}; --results DIR makes" in line for line in lines)
        assert not started

    def test_an_experiment_with_a_cell_to_run_is_run(self, tmp_path, capsys):
        e = experiment(methods=METHODS[1:3], rounds=1, like={METHODS[2]: METHODS[1]})
        cells: list[plan.Cell] = []
        while due := plan.due(e, records.scores(records.read(tmp_path))):
            assert runner.unfinished([e], tmp_path) == [e]
            for cell in due:
                line = {"cell": cell.key, "best": abs(cell.rate - RATES[2])}
                start = {**line, "event": "start"}
                records.append(tmp_path / "x.jsonl", [start, {**line, "event": "end"}])
            cells += due
        assert not capsys.readouterr().out
        assert runner.unfinished([e], tmp_path) == []
        assert f"x: nothing is due, all {len(cells)} cells are in" in capsys.readouterr().out
        assert len(cells) == 3 + 2 * 2 + 3


class TestRefusals:
    def test_a_report_needs_a_folder_of_lines(self, call, tmp_path, capsys):
        with pytest.raises(SystemExit) as refused:
            call("report", "theorem", "--results", tmp_path / "nowhere")
        assert refused.value.code == 2
        assert f"--results {tmp_path / 'nowhere'}: there is no such" in capsys.readouterr().err
        assert not (tmp_path / "nowhere").exists()

    def test_tiny_refuses_a_name_before_it_makes_data(self, call, monkeypatch):
        monkeypatch.setattr(small, "make", lambda folder: pytest.fail(f"made {folder}"))
        with pytest.raises(SystemExit, match="there is no experiment 'nosuch'"):
            call("tiny", "theorem", "nosuch")

    def test_git_ignores_what_a_run_leaves_beside_its_lines(self):
        root = plan.FOLDER.parents[1]
        lines = (root / ".gitignore").read_text(encoding="utf-8").splitlines()
        results = plan.RESULTS.relative_to(root).as_posix()
        assert {f"{results}/.lock", f"{results}/under-way/"} <= set(lines)
