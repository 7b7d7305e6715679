"""The house: who imports whom, what is public, and what must not creep in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dyndiag

PACKAGE = Path(dyndiag.__file__).parent

# room → the rooms that it may import (docs: CONTRIBUTING.md draws them)
MAY_IMPORT = {
    "errors": set(),
    "values": set(),
    "guard": set(),
    "batches": {"errors"},
    "schedule": set(),
    "state": {"batches", "values"},
    "rows": {"state", "values"},
    "boundary": set(),
    "door": {"batches", "errors", "probes", "values"},
    "facts": {"batches"},
    "curvature": {"errors", "guard"},
    "optimizers": {"curvature", "errors"},
    "landscape": {"batches", "curvature", "errors", "guard", "values"},
    "probes": {
        "batches", "curvature", "errors", "guard", "optimizers", "schedule", "state", "values",
    },
    "sampling": {"batches", "boundary", "guard", "probes", "schedule", "state", "values"},
    "detectors": {"errors", "values"},
    "continual": {"detectors", "errors", "store"},
    "store": {"errors", "values"},
    "sinks": {"errors", "values"},
    "keeping": {"boundary", "detectors", "rows", "sinks", "store", "values"},
    "monitor": {
        "batches", "boundary", "door", "facts", "keeping", "probes", "rows", "sampling", "state",
        "values",
    },
    "callbacks": {"batches", "errors", "monitor", "probes"},
    "reports": {"continual", "detectors", "errors", "store", "values"},
    "demos": {"errors", "monitor"},
    "cli": {"demos", "errors", "reports", "store", "values"},
    "__init__": {
        "boundary", "continual", "curvature", "errors", "landscape", "monitor", "probes",
        "reports", "store", "values",
    },
    "__main__": {"cli"},
}  # fmt: skip
NO_TORCH = {
    "errors", "values", "boundary", "continual", "detectors", "store", "sinks", "reports", "cli",
    "__init__",
}  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path) if name.startswith("dyndiag.")]
    rooms = {part[1] for part in parts}
    return {name for name in rooms if name in MAY_IMPORT} - {room(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_its_arrows_allow(path: Path) -> None:
    assert rooms_imported(path) <= MAY_IMPORT[room(path)]


def test_every_room_is_on_the_map() -> None:
    assert {room(path) for path in SOURCES} == set(MAY_IMPORT)


def test_the_arrows_make_no_ring() -> None:
    left = {name: set(arrows) for name, arrows in MAY_IMPORT.items()}
    while left:
        leaves = {name for name, arrows in left.items() if not arrows & left.keys()}
        assert leaves, f"a ring among {sorted(left)}"
        left = {name: arrows for name, arrows in left.items() if name not in leaves}


def test_no_files_import_each_other_in_a_ring() -> None:
    names = {
        ".".join(("dyndiag", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in SOURCES
    }
    arrows = {
        name: {
            target
            for full in imported(path)
            if (target := full if full in names else full.rpartition(".")[0]) in names
            and target != name
        }
        for name, path in names.items()
        # The package's own door imports lazily, and demos are imported by name.
        if name not in ("dyndiag",)
    }
    left = {name: targets & arrows.keys() for name, targets in arrows.items()}
    while left:
        leaves = {name for name, targets in left.items() if not targets & left.keys()}
        assert leaves, f"a ring among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in leaves}


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) in NO_TORCH], ids=str)
def test_rooms_that_need_no_torch_import_none(path: Path) -> None:
    assert not any(name == "torch" or name.startswith("torch.") for name in imported(path))


def catches_everything(node: ast.AST) -> bool:
    """A broad `except` that does not raise again, or a context manager that may swallow."""
    if isinstance(node, ast.ExceptHandler):
        kinds = ast.dump(node.type) if node.type else "everything"
        broad = any(name in kinds for name in ("everything", "'Exception'", "'BaseException'"))
        return broad and not isinstance(node.body[-1], ast.Raise)
    if isinstance(node, ast.FunctionDef) and node.name == "__exit__":
        returned = (n.value for n in ast.walk(node) if isinstance(n, ast.Return))
        return any(not isinstance(v, ast.Constant | None) or v.value for v in returned if v)
    return False


def test_one_place_catches_everything() -> None:
    found = [
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if catches_everything(node)
    ]
    assert found == ["boundary.py"]


@pytest.mark.parametrize(
    "code",
    [
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept: pass",
        "def __exit__(self, *error): return True",
        "def __exit__(self, *error): return not error",
    ],
)
def test_what_catches_everything_is_seen(code: str) -> None:
    assert any(map(catches_everything, ast.walk(ast.parse(code))))


def test_public_names() -> None:
    assert sorted(dyndiag.__all__) == [
        "DyndiagError", "DyndiagWarning", "Estimate", "Event", "Monitor", "Run", "continual",
        "curvature", "landscape", "probes", "report",
    ]  # fmt: skip
    for name in dyndiag.__all__:
        assert getattr(dyndiag, name) is not None
    monitor = {name for name in vars(dyndiag.Monitor) if not name.startswith("_")}
    assert monitor == {"step", "record", "start_task", "flush", "close"}
    run = {name for name in dir(dyndiag.Run) if not name.startswith("_")}
    assert {"names", "events", "metadata"} <= run
    assert dyndiag.curvature.__all__ == [
        "BatchSharpness", "Check", "Coherence", "CriticalLearningRate", "Crossing", "Diagonal",
        "Eigenpairs", "Engine", "Fisher", "FrobeniusNorm", "GaussNewton", "GeneralizedSharpness",
        "GradientFlowSharpness", "LossHessian", "Operator", "Outcome", "SpectralDensity", "Trace",
        "batch_sharpness", "block_diagonal", "coherence", "critical_learning_rate",
        "curvature_along", "deflated", "diagonal", "directional_sharpness", "eigenpairs", "fisher",
        "frobenius_norm", "gauss_newton", "generalized_sharpness", "gradient_flow_sharpness",
        "hessian", "loss_along", "loss_hessian", "mean_batch_sharpness", "neural_tangent_kernel",
        "neural_tangent_kernel_sharpness", "realised_edge", "scaled", "shifted", "spectral_density",
        "trace",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "use",
    [
        "import dyndiag",
        "import dyndiag; dyndiag.Run; dyndiag.report; dyndiag.Event",
        "import dyndiag.cli; dyndiag.cli.parser()",
        "from dyndiag import detectors, sinks",
    ],
)
def test_without_torch(use: str) -> None:
    without = "import sys; sys.modules['torch'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", without + use], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_is_light() -> None:
    heavy = "{'torch', 'pandas', 'matplotlib', 'scipy', 'numpy', 'jinja2'}"
    code = f"import sys, dyndiag; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
