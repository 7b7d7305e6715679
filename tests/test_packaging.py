"""What is shipped: one package, once, with its templates, and nothing beside it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = (".html", ".css", ".js", ".sql", ".typed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    back_end = "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", back_end, str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    back_end = "from setuptools import build_meta as b; import sys; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", back_end, str(folder)], cwd=source, check=True, capture_output=True
    )
    return folder


def test_the_wheel_holds_every_file_of_the_package_once(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "dyndiag"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.suffix in (".py", *DATA) and "__pycache__" not in path.parts
    } | {"dyndiag/py.typed"}
    assert shipped == expected


def test_the_wheel_brings_the_command_and_the_licence(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "dyndiag = dyndiag.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("LICENSE") for name in names)


def test_the_links_lead_into_the_package() -> None:
    for name in ("callbacks", "reports"):
        link = ROOT / name
        if link.is_symlink():  # a checkout without symlinks holds a text file instead
            assert link.resolve() == (ROOT / "dyndiag" / name).resolve()
        else:
            assert link.read_text().strip() == f"dyndiag/{name}"
