"""Run the experiments, and make their tables and figures.

    python -m examples.experiments list
    python -m examples.experiments run NAME [NAME ...] --data DIR
    python -m examples.experiments report [NAME ...]
    python -m examples.experiments tiny [NAME ...]

`run` goes on where it was stopped, however it was stopped. DIR has the folders e2e, eli5 and glue
(train, dev and test.jsonl each), gsm8k (train and test.jsonl) and gpt2_tokenizer; without --data
they come from the Hub, gsm8k excepted. `tiny` runs experiments in a few steps, on data and models
that it makes in a temporary folder.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from examples.experiments import plan


def main() -> None:
    """Read the command line."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m examples.experiments",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["list", "run", "report", "tiny"])
    parser.add_argument(
        "names",
        nargs="*",
        help="experiments; without, those of the page for report, and all for tiny",
    )
    parser.add_argument("--data", type=Path, help="folder of data sets (without it, the Hub)")
    parser.add_argument(
        "--model", help="in the place of the file's: smollm2, minilm, a name of the Hub, a folder"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/bases"), help="of base models")
    parser.add_argument(
        "--results", type=Path, default=plan.FOLDER / "results", help="of the lines"
    )
    parser.add_argument(
        "--figures", type=Path, help="folder (default: beside the page, or the lines)"
    )
    parser.add_argument(
        "--page", type=Path, help="of the tables (default: RESULTS.md, for its lines)"
    )
    parser.add_argument("--experiments", type=Path, default=plan.SPECS, help="of the TOML files")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument(
        "--cores", type=int, default=0, help="that all jobs share (default: the machine's)"
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is a positive number of cells, got {args.jobs}")
    if args.cores < 0:
        parser.error(f"--cores is a number of cores, or 0 for the machine's, got {args.cores}")

    def loaded(names: list[str]) -> list[plan.Experiment]:
        found = [plan.load(name, args.experiments) for name in names]
        return [plan.with_model(e, args.model) for e in found] if args.model else found

    if args.command == "list":
        for name in plan.names(args.experiments):
            print(f"{name:24}{plan.load(name, args.experiments).title}")
    elif args.command == "run":
        from examples.experiments import needs, runner

        if not args.names:
            parser.error("run needs the name of an experiment; `list` shows them")
        left = runner.unfinished(loaded(args.names), args.results)
        needs.check(left, args.data)
        for experiment in left:
            runner.run(experiment, args.data, args.cache, args.results, args.jobs, args.cores)
    elif args.command == "tiny":
        names = args.names or plan.names(args.experiments)
        tiny([plan.load(name, args.experiments) for name in names], args.jobs)
    elif not args.results.is_dir():
        parser.error(f"--results {args.results}: there is no such folder, so no lines to report")
    else:
        from examples.experiments import figures as drawing
        from examples.experiments import report

        own_files = args.experiments.resolve() == plan.SPECS.resolve() and not args.model
        page, figures = report.places(args.results, args.page, args.figures, own_files)
        known = plan.names(args.experiments)
        names = args.names or report.placed(page or plan.FOLDER / "RESULTS.md", known)
        for experiment in loaded(names):
            print(report.write(experiment, args.results, figures, page))
        if page is not None and not args.names and report.published(args.results):
            print(f"figure: {drawing.draw_summary(args.results, figures)}")
        for name, text in (("columns", report.COLUMNS), ("spent", report.spent(args.results))):
            print(text)
            if page is not None:
                report.place(page, name, text)


def tiny(experiments: list[plan.Experiment], jobs: int) -> None:
    """Run experiments in their tiny form, and report on them."""
    from examples.experiments import report, runner
    from examples.experiments import tiny as small

    with tempfile.TemporaryDirectory() as folder:
        data, results = Path(folder) / "data", Path(folder) / "results"
        small.make(data)
        for experiment in map(small.shrink, experiments):
            runner.run(experiment, data, Path(folder) / "bases", results, jobs)
            print(report.write(experiment, results, Path(folder) / "figures", None))


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f'{error}: the experiments need `pip install -e ".[experiments]"`')
    except KeyboardInterrupt:
        print("interrupted: finished cells are kept, the others start again", file=sys.stderr)
        sys.exit(130)
