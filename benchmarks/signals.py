"""What each probe that is asked for costs a sample, as a share of a training step.

    OMP_NUM_THREADS=1 python benchmarks/signals.py

On the GPT and the CNN of benchmarks/overhead.py, each probe by itself in a run of its own, by the
seconds that the run keeps for it (in its metadata, under "cost"); divided by the median step of the
same run. Prints the table of docs/signals.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from overhead import PROBLEMS

import dyndiag
from dyndiag import probes, schedule
from dyndiag.schedule import Budget, Every, FixedInterval

STEP_PROBES = ["AdamMoments", "Cosines", "GradientHistory", "ParameterNorms", "WeightDistances"]
SAMPLED = [
    "Activations", "ClassImbalance", "InputJacobian", "LossQuantiles", "NeuralCollapse",
    "NoiseScale", "OpposingSignals", "SAMRatio", "Similarity", "TokenFrequency", "TopSpace",
    "WeightMatrices",
]  # fmt: skip
DEFAULT = {"BatchSharpness": 11, "Trace": 11, "Density": 33, "Sharpness": 11}
"""Of the default set, with what stands in for its schedule here."""


def cost(problem: str, name: str, due: Any, steps: int) -> tuple[float, float]:
    """(seconds a sample, seconds a step without it); NaN where there is nothing to measure."""
    model, optimizer, batches, loss_fn = PROBLEMS[problem]()
    asked = [] if name in DEFAULT else [getattr(probes, name)(due=due)]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        with dyndiag.Monitor(
            model, optimizer, loss_fn, run=folder, tensorboard=False, budget=1e-9, probes=asked
        ) as monitor:
            for probe in monitor._sampler._probes:
                if probe.name == name:
                    probe.due = due
            for step in range(steps):
                batch = batches[step % len(batches)]
                began = time.perf_counter()
                loss = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - began)
                monitor.step(loss=loss, batch=batch)
        spent = dyndiag.Run(folder).metadata["cost"].get(name)
    if not spent or not spent["samples"]:
        return float("nan"), statistics.median(seconds)
    return spent["seconds"] / spent["samples"], statistics.median(seconds)


def cadence(name: str) -> str:
    """The default schedule, in words."""
    due = getattr(probes, name)().due
    if isinstance(due, Every):
        return f"every {due.n} steps" if due.n > 1 else "every step"
    if isinstance(due, FixedInterval):
        return f"every {due.interval} steps, less often beyond 1 %"
    return "as 1 % allows" if isinstance(due, Budget) else "two steps of 11"


def row(name: str, due: Callable[[], Any], steps: int) -> str:
    found = []
    for problem in PROBLEMS:
        sample, step = cost(problem, name, due(), steps)
        found.append(f"{100 * sample / step:.3g} %" if sample == sample else "nothing to measure")
    when = "shares the budget" if name in DEFAULT else cadence(name)
    return f"| `{name}` | {' | '.join(found)} | {when} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=67)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyndiag.DyndiagWarning)
    schedule.GRACE = 0.0
    print("| probe | a sample on the GPT | on the CNN | default cadence |\n|---|---|---|---|")
    for name in arguments.names or [*STEP_PROBES, *SAMPLED, *DEFAULT]:
        interval = 1 if name in STEP_PROBES else DEFAULT.get(name, 11)
        print(row(name, lambda n=interval: Every(n), arguments.steps), flush=True)
