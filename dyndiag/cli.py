"""The command line: one function a command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dyndiag import __version__
from dyndiag.errors import DyndiagError
from dyndiag.values import Event

_ACT_ON = {"divergence", "non_finite"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 `--check` found something, 2 an error."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except DyndiagError as error:
        print(f"dyndiag: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dyndiag: stopped; what was recorded is kept", file=sys.stderr)
        return 130
    return code


def parser() -> argparse.ArgumentParser:
    """Every command with its help."""
    main_parser = argparse.ArgumentParser(
        prog="dyndiag",
        description="What happened in a training run, and how sure that is.",
        epilog="Exit codes: 0 done; 1 `events --check` found something to act on; "
        "2 bad input, told in one sentence on stderr.",
    )
    main_parser.add_argument("--version", action="version", version=f"dyndiag {__version__}")
    commands = main_parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train three small models on real data and report what happened",
        description="Trains on real data with a monitor, then prints what was found and where "
        "the report is. edge: gradient descent reaches the edge of stability. gap: accuracy on "
        "an old task dips when a new one begins. spike: a transformer at too high a learning "
        "rate. Needs scikit-learn: pip install 'dyndiag[demo]'.",
    )
    demo.add_argument(
        "story", nargs="?", default="all", choices=["edge", "gap", "spike", "all"],
        help="which one (default: all)",
    )  # fmt: skip
    demo.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER",
        help="where the runs go, each in a folder of its own that is replaced (default: runs)",
    )  # fmt: skip
    demo.set_defaults(command=_demo)

    report = commands.add_parser(
        "report",
        help="write one HTML page about each run",
        description="Reads runs (also ones that are still training), judges them anew and writes "
        "RUN/report.html: one file, no network. Prints each verdict and the page's path.",
    )
    report.add_argument("run", nargs="+", metavar="RUN", help="folder of a run")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="where the page goes (with a single run)"
    )
    report.set_defaults(command=_report)

    events = commands.add_parser(
        "events",
        help="list what happened in a run",
        description="One line an event: kind, steps, severity, confidence (0 to 1).",
    )
    events.add_argument("run", metavar="RUN", help="folder of a run")
    events.add_argument("--json", action="store_true", help="as a JSON array, with all details")
    events.add_argument(
        "--check", action="store_true",
        help="exit with 1 if the run diverged, became non-finite, or ended in an open loss spike",
    )  # fmt: skip
    events.set_defaults(command=_events)
    return main_parser


def _demo(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    stories = ["edge", "gap", "spike"] if arguments.story == "all" else [arguments.story]
    for story in stories:
        demo = import_module(f"dyndiag.demos.{story}")
        print(f"{story}: {(demo.__doc__ or story).splitlines()[0]}", flush=True)
        folder = arguments.runs / story
        _clear(folder)
        began = time.perf_counter()
        with _Bar() as bar:
            demo.train(folder, bar)
        print(f"  trained in {time.perf_counter() - began:.0f} s")
        _tell(folder, None)
    return 0


def _clear(folder: Path) -> None:
    """Remove a former demo run, and nothing that is not one."""
    if not folder.exists():
        return
    if folder.is_dir() and ((folder / "run.db").exists() or not any(folder.iterdir())):
        import shutil

        shutil.rmtree(folder)
    else:
        raise DyndiagError(
            f"{folder} exists and is not a run: choose another place with --runs FOLDER"
        )


def _report(arguments: argparse.Namespace) -> int:
    if arguments.output is not None and len(arguments.run) > 1:
        raise DyndiagError("--output takes one run; without it each page goes into its run")
    code = 0
    for run in _watched(arguments.run, "reports"):
        try:
            _tell(Path(run), arguments.output)
        except DyndiagError as error:  # the others are still to be told
            print(f"dyndiag: {error}", file=sys.stderr)
            code = 2
    return code


def _tell(folder: Path, output: Path | None) -> None:
    from dyndiag.reports import contents, report, verdict
    from dyndiag.store import Run

    page = report(folder, output)
    print(f"  {verdict(contents(Run(folder)))}")
    print(f"  report: {page}", flush=True)


def _events(arguments: argparse.Namespace) -> int:
    from dyndiag.store import Run

    events = Run(arguments.run).event_list()
    if arguments.json:
        print(json.dumps([_as_json(event) for event in events], indent=2))
    elif not events:
        print("no events")
    else:
        for event in events:
            print(_line(event))
    if arguments.check:
        return int(any(_to_act_on(event) for event in events))
    return 0


def _as_json(event: Event) -> dict[str, Any]:
    # JSON has no NaN and no infinity: a reader in another language would stop there.
    def plain(value: Any) -> Any:
        infinite = isinstance(value, float) and not abs(value) < float("inf")
        return str(value) if infinite else value

    return {
        "kind": event.kind,
        "start": event.start,
        "peak": event.peak,
        "end": event.end,
        "severity": plain(event.severity),
        "confidence": plain(event.confidence),
        "series": list(event.series),
        "details": {key: plain(value) for key, value in event.details.items()},
    }


def _line(event: Event) -> str:
    end = "still open" if event.end is None else f"to {event.end:,}"
    return (
        f"{event.kind:24s} step {event.start:>9,} {end:>14s}   peak {event.peak:>9,}   "
        f"severity {event.severity:.3g}   confidence {event.confidence:.2f}   "
        f"{', '.join(event.series)}"
    )


def _to_act_on(event: Event) -> bool:
    return event.kind in _ACT_ON or (event.kind == "loss_spike" and event.end is None)


def _watched(items: Sequence[str], what: str) -> Any:
    if len(items) == 1:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, file=sys.stderr)


class _Bar:
    """A progress bar that a training calls with (done, of)."""

    def __enter__(self) -> Callable[[int, int], None]:
        from tqdm import tqdm

        self._bar = tqdm(total=0, unit="step", file=sys.stderr, leave=False)
        return self._show

    def _show(self, done: int, of: int) -> None:
        self._bar.total = of
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
