"""Curvature side by side with other people's tools: products, errors, time.

    pip install --no-deps --target peers -r benchmarks/requirements-peers.txt
    OMP_NUM_THREADS=1 PYTHONPATH=peers python benchmarks/curvature.py            # everything
    OMP_NUM_THREADS=1 PYTHONPATH=peers python benchmarks/curvature.py --table top1

Without --no-deps pip would bring another torch along. Without the peers their rows stay out.

Tables: product, top1, starts, top10, lists, lengths, trace, density. Problems and truths:
problems.py. Tools take
turns within a round, and every time is given as a ratio to a gradient (one forward and backward
pass) of the same problem in the same round: median over rounds, and lowest to highest. Times are
processor time, which with one thread is wall time less what other processes took in between.
Some 40 minutes, and eight for training and truths the first time, which stay in --cache.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import problems
import scipy
import starts
import torch
from problems import FIVE_THOUSAND, LARGE, OTHER_LENGTHS, SMALL, Floats, Problem, Spectrum
from scipy.stats import wasserstein_distance

import dyndiag.curvature as curvature
from dyndiag.errors import DyndiagError

ERROR = 1e-3
"""The true error that every comparison is at."""


def say(line: str) -> None:
    """Progress goes to stderr: stdout is Markdown."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---" for _ in header) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def bar(what: str, value: Any, limit: float, *, at_least: bool = False) -> None:
    """One line for a figure that was promised."""
    met = value >= limit if at_least else value <= limit
    sign = "≥" if at_least else "≤"
    print(f"- {'met' if met else '**missed**'}: {what}: {value:.3g} (bar {sign} {limit:g})")


clock = time.process_time


def seconds(call: Callable[[], Any]) -> float:
    began = clock()
    call()
    return clock() - began


def spread(values: Sequence[float]) -> str:
    """Median (lowest–highest)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def hessian(problem: Problem, **options: Any) -> curvature.LossHessian:
    return curvature.hessian(problem.model, problem.loss_fn, problem.batch, **options)


# --- one product ---------------------------------------------------------------------------------


ENGINES = ("cached", "rebuilt", "forward_over_reverse", "linearised")


def product_table(load: Loader, rounds: int) -> None:
    rows, bars = [], []
    for problem, _ in load(LARGE):
        say(f"product: {problem.name}")
        chosen = hessian(problem).engine
        operators = {"auto": hessian(problem)}
        for engine in ENGINES:
            if engine == "linearised" and "forward_over_reverse" not in operators:
                continue  # torch.func.linearize crashes where forward mode fails, as in mse_loss
            try:
                operators[engine] = hessian(problem, engine=engine)
            except DyndiagError as error:
                say(f"{engine} on {problem.name}: {error}")
        v = torch.randn(problem.size, generator=torch.Generator().manual_seed(0))
        ratios: dict[str, list[float]] = {name: [] for name in operators}
        for operator in operators.values():
            operator.product(v)
        for _ in range(max(rounds, 5)):
            gradient = min(seconds(problem.gradient) for _ in range(3))
            for name, operator in operators.items():
                took = min(seconds(lambda o=operator, v=v: o.product(v)) for _ in range(3))
                ratios[name].append(took / gradient)
        build, first = [], []
        for _ in range(max(rounds, 5)):
            gradient = min(seconds(problem.gradient) for _ in range(3))
            build.append(seconds(lambda p=problem: hessian(p)) / gradient)
            fresh = replace(problem, model=copy.deepcopy(problem.model))
            first.append(seconds(lambda p=fresh: hessian(p)) / gradient)
        rows.append(
            [problem.name, f"{problem.size:,}", f"{1e3 * gradient:.1f} ms", chosen.name]
            + [spread(ratios[e]) if e in ratios else "–" for e in ("auto", *ENGINES)]
            + [spread(build), spread(first)]
        )
        limit = {"mlp_mse 55k, edge": 2.0, "mlp_ce 55k": 2.0, "gpt 0.5M": 2.2}.get(problem.name)
        if limit:
            bars.append((f"product, {problem.name}", statistics.median(ratios["auto"]), limit))
    header = ["problem", "parameters", "gradient", "engine chosen", "`auto`", *ENGINES]
    table(
        "One product, in gradients",
        [*header, "making the operator", "the first time on a model, with the check"],
        rows,
    )
    print()
    for each in bars:
        bar(*each)


# --- top 1 and top 10, cold ----------------------------------------------------------------------


@dataclass
class Record:
    """One tool on one problem, over the rounds."""

    products: list[int] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def cells(self) -> list[str]:
        return [spread(self.products), spread(self.gradients), f"{max(self.errors):.0e}"]

    @property
    def cost(self) -> float:
        return statistics.median(self.gradients)


def compete(
    problem: Problem, k: int, tools: dict[str, tuple[peers.Solver, Floats]], rounds: int
) -> dict[str, Record]:
    """Each tool once a round, in an order that turns; each is (solver, what it looks for)."""
    records = {name: Record() for name in tools}
    problem.gradient()
    for r in range(rounds):
        names = list(tools)
        names = names[r % len(names) :] + names[: r % len(names)]
        gradients, taken = [], {}
        for name in names:
            solver, truth = tools[name]
            gradients += [seconds(problem.gradient) for _ in range(3)]
            began = clock()
            answer = solver(problem, k, r)
            taken[name] = clock() - began
            records[name].products.append(answer.products)
            error = np.abs(answer.values[:k] - truth[:k]) / np.abs(truth[:k])
            if name.startswith("PyHessian"):  # it finds them in any order
                error = np.abs(np.sort(answer.values) - np.sort(truth[:k])) / np.sort(
                    np.abs(truth[:k])
                )
            records[name].errors.append(float(np.nanmax(error)))
        gradient = statistics.median(gradients)
        for name, took in taken.items():
            records[name].gradients.append(took / gradient)
    return records


def on_a_fresh_model(solver: peers.Solver) -> peers.Solver:
    """With all that is done once for each model. The copying is small beside the rest."""

    def solve(problem: Problem, k: int, seed: int) -> peers.Answer:
        return solver(replace(problem, model=copy.deepcopy(problem.model)), k, seed)

    return solve


def tolerance_for(spectrum: Spectrum) -> float:
    """The loosest with which PyHessian's rule is within 1e-3 from 99 of 100 starts: what a user
    who does not know the truth must ask for."""
    for tolerance in (3e-4, 1e-4, 3e-5, 1e-5, 3e-6):
        draw = np.random.default_rng(0)
        values, _ = starts.power_iteration(spectrum, 100, draw, 2000, tolerance)
        if np.mean(np.abs(values / spectrum.values[0] - 1) <= ERROR) >= 0.99:
            break
    return tolerance


def tools_for(
    spectrum: Spectrum, k: int, with_peers: bool
) -> dict[str, tuple[peers.Solver, Floats]]:
    tools: dict[str, tuple[peers.Solver, Floats]] = {}
    top, magnitude = spectrum.top, spectrum.largest_in_magnitude
    if with_peers:
        tools["PyHessian, as called (1e-3)"] = peers.pyhessian, magnitude
        # With ten, deflation by vectors that are not there yet spoils what an oracle could tell,
        # and with 1e-4 no list is within 1e-3.
        tolerance = tolerance_for(spectrum) if k == 1 else 1e-5
        name = f"PyHessian, tolerance {tolerance:.0e}"
        tools[name] = peers.pyhessian_to(tolerance), magnitude
        if k == 1:
            tools["PyHessian, told when to stop"] = peers.driven_pyhessian(magnitude), magnitude
        tools["curvlinops + SciPy eigsh"] = peers.eigsh_on_curvlinops, top
    tools["SciPy eigsh on our products"] = peers.eigsh_on_ours, top
    if k == 1:
        tools["dyndiag, fast rule"] = peers.ours_fast, top
        tools["dyndiag, fast rule, from an eighth"] = peers.ours_from_a_part, top
    tools["dyndiag, certified"] = peers.ours, top
    tools["dyndiag, certified, first use of a model"] = on_a_fresh_model(peers.ours), top
    return tools


CLUSTERED = ("mlp_mse 55k, edge", "gpt 0.5M")


def cold_table(load: Loader, k: int, rounds: int, with_peers: bool) -> None:
    rows, bars = [], []
    for problem, spectrum in load(LARGE):
        say(f"top {k}: {problem.name}")
        records = compete(problem, k, tools_for(spectrum, k, with_peers), rounds)
        certified = records["dyndiag, certified"]
        for name, record in records.items():
            rows.append(
                [problem.name, name, *record.cells(), f"{record.cost / certified.cost:.2f}"]
            )
        bars.append((f"error, {problem.name}", max(certified.errors), ERROR, False))
        most = {"mlp_mse 55k, edge": 30, "mlp_ce 55k": 30, "gpt 0.5M": 57}.get(problem.name)
        if k > 1 and most:
            bars.append((f"products, {problem.name}", max(certified.products), most, False))
        for rule in ("fast rule", "certified"):
            if (ours := records.get(f"dyndiag, {rule}")) is None:
                continue
            if k == 1:
                eigsh = records["SciPy eigsh on our products"].cost / ours.cost
                bars.append((f"eigsh over {rule}, {problem.name}", eigsh, 1.5, True))
            for peer, record in records.items():
                if peer.startswith("PyHessian"):
                    limit = 6.0 if k > 1 else 3.0 if problem.name in CLUSTERED else 1.0
                    ratio = record.cost / ours.cost
                    bars.append((f"{peer}, over {rule}, {problem.name}", ratio, limit, True))
    table(
        f"Top {k}, cold",
        ["problem", "tool", "products", "gradients", "largest error", "cost over certified"],
        rows,
    )
    print()
    for what, value, limit, at_least in bars:
        bar(what, value, limit, at_least=at_least)


# --- many starts ---------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of many starts on one spectrum."""

    products: list[float] = field(default_factory=list)
    off: int = 0
    other: int = 0
    claimed: int = 0
    """Wrong, and called converged."""

    def add(self, values: Floats, products: float, truth: Floats, claims: bool) -> None:
        k = len(values)
        error = float(np.max(np.abs(values - truth[:k]) / np.abs(truth[:k])))
        self.products.append(products)
        self.off += error > ERROR
        self.claimed += error > ERROR and claims
        nearest = truth[np.argmin(np.abs(truth - values[0]))]
        self.other += k == 1 and nearest < truth[0] * (1 - ERROR)

    def cell(self) -> str:
        return f"{np.mean(self.products):.1f} ({max(self.products):.0f}), {self.off} / {self.other}"


def floor_of(spectrum: Spectrum, k: int, count: int) -> str:
    """What an oracle that stops the run would need, from a fifth as many starts."""
    draw = np.random.default_rng(1)
    products = [starts.floor(spectrum, k, draw) for _ in range(max(count // 5, 10))]
    return f"{statistics.median(products):.0f} / {max(products)}"


def starts_table(load: Loader, count: int) -> None:
    tallies: dict[str, list[Tally]] = {}
    rows = []
    rules = {
        "fast rule, gradient + random": {"fast": True, "gradient": True},
        "fast rule, random": {"fast": True, "gradient": False},
        "certified, random": {"fast": False, "gradient": False},
        "certified, gradient + random": {"fast": False, "gradient": True},
    }
    for problem, spectrum in load({**SMALL, **LARGE}):
        say(f"{count} starts: {problem.name}")
        draw = np.random.default_rng(0)
        values, products = starts.power_iteration(spectrum, count, draw)
        tally = Tally()
        for value, spent in zip(values, products, strict=True):
            tally.add(np.array([value]), spent, spectrum.values, True)
        tallies.setdefault("PyHessian", []).append(tally)
        for name, rule in rules.items():
            tally = Tally()
            for _ in range(count):
                found = starts.solve(spectrum, 1, draw, **rule)
                tally.add(found.values.numpy(), found.products, spectrum.values, found.converged)
            tallies.setdefault(name, []).append(tally)
        label = f"{problem.name} (gap {spectrum.gap:.0%})"
        rows.append(
            [label, floor_of(spectrum, 1, count), *(each[-1].cell() for each in tallies.values())]
        )
    total = ["all", ""]
    for each in tallies.values():
        whole = Tally(
            [p for t in each for p in t.products],
            sum(t.off for t in each),
            sum(t.other for t in each),
        )
        total.append(whole.cell())
    table(
        f"{count} random starts on each spectrum: mean products (most), "
        "error > 1e-3 / another eigenvalue returned",
        ["spectrum", "floor: half / all starts", "PyHessian's rule", *rules],
        [*rows, total],
    )
    print()
    fast, certified = tallies["fast rule, gradient + random"], tallies["certified, random"]
    everything = [p for t in certified for p in t.products]
    bar("fast rule, mean products", np.mean([p for t in fast for p in t.products]), 12)
    bar("fast rule, wrong", sum(t.off for t in fast), 0)
    bar("certified, mean products", np.mean(everything), 16)
    bar("certified, most products", max(everything), 28)
    bar("certified, wrong", sum(t.off for t in certified), 0)
    bar("certified, wrong and called converged", sum(t.claimed for t in certified), 0)


def lists_table(load: Loader, count: int) -> None:
    """Top 10 over many starts."""
    rows, bars = [], []
    for problem, spectrum in load({**SMALL, **LARGE}):
        if problem.name == "saddle":  # its top ten are two values
            continue
        say(f"top 10, {count} starts: {problem.name}")
        draw = np.random.default_rng(0)
        tally, converged = Tally(), 0
        for _ in range(count):
            found = starts.solve(spectrum, 10, draw, fast=False, gradient=False)
            tally.add(found.values.numpy(), found.products, spectrum.values, found.converged)
            converged += found.converged
        top = spectrum.top
        closest = float(np.min(1 - top[1:] / top[:-1]))
        rows.append(
            [
                problem.name,
                f"{closest:.1%}",
                floor_of(spectrum, 10, count),
                f"{np.mean(tally.products):.1f}",
                f"{max(tally.products):.0f}",
                f"{converged}",
                f"{tally.off}",
                f"{tally.claimed}",
            ]
        )
        bars.append((f"wrong lists called converged, {problem.name}", tally.claimed))
    table(
        f"Top 10 over {count} random starts, certified",
        [
            "spectrum",
            "closest two of the ten",
            "floor: half / all starts",
            "mean products",
            "most",
            "converged",
            "wrong lists",
            "wrong and called converged",
        ],
        rows,
    )
    print()
    for what, wrong in bars:
        bar(what, wrong, max(1, count // 1000))


def lengths_table(load: Loader, count: int) -> None:
    """The large problems after other lengths of training: what we take beside what is needed."""
    rows = []
    for name in OTHER_LENGTHS:
        ((_, spectrum),) = load([name])
        say(f"{count} starts: {name}")
        draw = np.random.default_rng(0)
        cells = [f"{name} (gap {spectrum.gap:.0%})"]
        for k in (1, 10):
            cells.append(floor_of(spectrum, k, count))
            for fast in (True, False):
                tally = Tally()
                for _ in range(count if k == 1 or not fast else 0):
                    found = starts.solve(spectrum, k, draw, fast=fast, gradient=fast)
                    values, truth = found.values.numpy(), spectrum.values
                    tally.add(values, found.products, truth, found.converged)
                if tally.products:
                    mean, most = np.mean(tally.products), max(tally.products)
                    cells.append(f"{mean:.1f} ({most:.0f}), {tally.off}")
        rows.append(cells)
    table(
        f"Other lengths of training, {count} starts: mean products (most), answers off by > 1e-3",
        [
            "spectrum",
            "top 1, floor: half / all starts",
            "fast rule, gradient + random",
            "certified, random",
            "top 10, floor",
            "certified, random",
        ],
        rows,
    )


# --- trace ---------------------------------------------------------------------------------------


def trace_table(load: Loader, seeds: int) -> None:
    """Products to 1 % relative standard error, and whether the error is what it says."""
    rows, bars = [], []

    def line(name: str, operator: curvature.Operator, matrix: torch.Tensor, target: float) -> None:
        truth = matrix.trace().item()
        variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()).item()
        hutchinson = math.ceil(variance / (target * truth) ** 2)
        for method in ("auto", "hutchinson", "krylov", "hutch++", "xtrace"):
            spent, off, covered, used = [], [], 0, set()
            for seed in range(seeds):
                found = curvature.trace(
                    operator,
                    method=method,
                    relative_error=target,
                    max_products=4 * hutchinson,
                    generator=torch.Generator().manual_seed(seed),
                )
                spent.append(found.products)
                off.append(found.value / truth - 1)
                used.add(found.method)
                low, high = found.interval()
                covered += low <= truth <= high
            rows.append(
                [
                    name,
                    f"{target:.2%}",
                    f"{hutchinson}",
                    method + (f" → {', '.join(sorted(used))}" if method == "auto" else ""),
                    f"{np.mean(spent):.0f} ({min(spent)}–{max(spent)})",
                    f"{np.sqrt(np.mean(np.square(off))):.2%}",
                    f"{covered} of {seeds}",
                ]
            )
            if method == "auto":
                share = 1 / 3 if "decays" in name else 1.1
                bars.append(
                    (f"products over Hutchinson's, {name}", np.mean(spent) / hutchinson, share)
                )

    for problem, _ in load([FIVE_THOUSAND]):
        say("trace: digits MLP, 5,018 parameters")
        matrix, _ = problems.dense(problem)
        line("digits MLP 5k, decays", hessian(problem), matrix, 0.01)

    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((1000, 1000)))[0]
    flat = {
        "flat, 0 to 1": np.linspace(0, 1, 1000),
        "flat, −1 to 1.5": np.linspace(-1, 1.5, 1000),
    }
    for name, values in flat.items():
        say(f"trace: {name}")
        matrix = torch.from_numpy(basis * values @ basis.T)
        operator = curvature.Operator(matrix.mv, 1000, torch.float64, torch.device("cpu"))
        variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()).item()
        target = math.sqrt(variance / 200) / matrix.trace().item()  # Hutchinson needs 200
        line(name, operator, matrix, target)
    table(
        f"Trace to a given relative standard error, {seeds} seeds",
        [
            "matrix",
            "asked for",
            "Hutchinson needs (exact variance)",
            "method",
            "products",
            "true error, root mean square",
            "95 % interval covers",
        ],
        rows,
    )
    print()
    for each in bars:
        bar(*each)


# --- density -------------------------------------------------------------------------------------


def density_table(load: Loader, seeds: int, with_peers: bool) -> None:
    """Wasserstein-1 to the exact spectrum over its width, at 100 products."""
    rows, figures = [], {}
    for problem, spectrum in load([FIVE_THOUSAND]):
        exact = spectrum.values
        width = exact.max() - exact.min()

        def ours(seed: int, problem: Problem = problem) -> tuple[Floats, Floats, int]:
            found = curvature.spectral_density(
                hessian(problem), generator=torch.Generator().manual_seed(seed)
            )
            weights = found.weights / len(found.weights)
            return found.nodes.flatten().numpy(), weights.flatten().numpy(), found.products

        def theirs(seed: int, problem: Problem = problem) -> tuple[Floats, Floats, int]:
            return *peers.pyhessian_density(problem, 100, seed), 100

        tools: dict[str, Callable[[int], tuple[Floats, Floats, int]]] = {"dyndiag": ours}
        if with_peers:
            tools["PyHessian, 100 × 1, `torch.eig` put back"] = theirs
        distances: dict[str, list[float]] = {name: [] for name in tools}
        costs: dict[str, list[float]] = {name: [] for name in tools}
        products: dict[str, int] = {}
        for seed in range(seeds):
            if seed % 10 == 0:
                say(f"density: seed {seed} of {seeds}")
            gradient = statistics.median(seconds(problem.gradient) for _ in range(15))
            for name, tool in tools.items():
                began = clock()
                nodes, weights, products[name] = tool(seed)
                costs[name].append((clock() - began) / gradient)
                distances[name].append(
                    wasserstein_distance(exact, nodes, None, np.maximum(weights, 0)) / width
                )
        for name in tools:
            figures[name] = np.mean(distances[name]), max(distances[name])
            rows.append(
                [
                    name,
                    f"{products[name]}",
                    f"{np.mean(distances[name]):.1e}",
                    f"{max(distances[name]):.1e}",
                    spread(costs[name]),
                ]
            )
    table(
        f"Density of the digits MLP with 5,018 parameters, {seeds} seeds",
        ["tool", "products", "Wasserstein-1 / width, mean", "worst", "gradients"],
        rows,
    )
    print()
    mean, worst = figures["dyndiag"]
    bar("distance, mean", mean, 6e-4)
    bar("distance, worst", worst, 8e-4)
    if with_peers:
        peer = statistics.median(costs["PyHessian, 100 × 1, `torch.eig` put back"])
        bar("cost over PyHessian's", statistics.median(costs["dyndiag"]) / peer, 0.5)


# --- all of it -----------------------------------------------------------------------------------

Loader = Callable[[Any], list[tuple[Problem, Spectrum]]]
TABLES = ("product", "top1", "starts", "top10", "lists", "lengths", "trace", "density")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, action="append", help="only this one")
    parser.add_argument("--rounds", type=int, default=5, help="of top1; top10 takes half as many")
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=30, help="of density; trace takes 20 of them")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "dyndiag-benchmark"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with_peers = peers.available()

    def load(names: Any) -> list[tuple[Problem, Spectrum]]:
        return list(problems.load_all(list(names), arguments.cache, say))

    print(
        f"{processor()}, one thread; Python {platform.python_version()}, torch "
        f"{torch.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}."
    )
    steps: dict[str, Callable[[], None]] = {
        "product": lambda: product_table(load, arguments.rounds),
        "top1": lambda: cold_table(load, 1, arguments.rounds, with_peers),
        "starts": lambda: starts_table(load, arguments.starts),
        "top10": lambda: cold_table(load, 10, max(2, arguments.rounds // 2), with_peers),
        "lists": lambda: lists_table(load, arguments.starts),
        "lengths": lambda: lengths_table(load, max(arguments.starts // 5, 10)),
        "trace": lambda: trace_table(load, min(arguments.seeds, 20)),
        "density": lambda: density_table(load, arguments.seeds, with_peers),
    }
    for name in arguments.table or TABLES:
        began = time.perf_counter()
        took = seconds(steps[name])
        say(f"{name}: {took:.0f} s of processor time, {time.perf_counter() - began:.0f} s in all")


def processor() -> str:
    """Its name, and no more about the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
