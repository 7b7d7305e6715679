"""What cannot be is said in one sentence: what was expected, what came, what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import pytest

from dyndiag.errors import DyndiagError
from dyndiag.store import Run, Writer


def record(folder: Path, **values: float) -> Path:
    with closing(Writer(folder)) as writer:
        writer.write([(0, {"train/loss": 1.0, **values})])
    return folder


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DyndiagError, match=r"holds other files and no run\.db: choose an empty"):
        Writer(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_may_lie_beside_other_files(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "report.html").touch()
    with closing(Writer(tmp_path)) as writer:
        assert writer.next_step == 1


@pytest.mark.parametrize("left", [["run.db-lock"], ["run.db-lock", "run.db"]])
def test_what_a_killed_start_left_does_not_block(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).touch()
    record(tmp_path)
    assert Run(tmp_path).names == ["train/loss"]


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/dyndiag"])
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DyndiagError, match=r"cannot be made a run's folder \(.+\): choose another"):
        Writer(tmp_path / folder)


def test_a_second_writer_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as first:
        with pytest.raises(DyndiagError, match="being written by another monitor"):
            Writer(tmp_path, first_step=0)
        first.write([(0, {"train/loss": 1.0})])
        other = subprocess.run(
            [sys.executable, "-c", f"from dyndiag.store import Writer; Writer({str(tmp_path)!r})"],
            capture_output=True,
            text=True,
        )
        assert "being written by another monitor" in other.stderr
        first.write([(1, {"train/loss": 1.0})])
    with closing(Writer(tmp_path)) as second:
        assert second.next_step == 2


def test_a_writer_that_was_refused_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"no database" * 100)
    for _ in range(2):
        with pytest.raises(DyndiagError, match=r"run\.db: it is damaged, or no SQLite file at all"):
            Writer(tmp_path)


def test_closing_twice_is_allowed_and_writing_after_it_is_not(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(DyndiagError, match=r"run\.db: Cannot operate on a closed database\.$"):
        writer.write([(0, {"train/loss": 1.0})])


def test_what_is_no_run_names_the_runs_around_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        record(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no database, but as long as a header of one" * 9)
    beside = r"Runs beside it: first, second\."
    with pytest.raises(
        DyndiagError, match=rf"thrid is not a run: there is no such folder. {beside}"
    ):
        Run(tmp_path / "thrid")
    with pytest.raises(DyndiagError, match=rf"empty is not a run: it holds no run.db. {beside}"):
        Run(str(tmp_path / "empty"))
    with pytest.raises(DyndiagError, match=r"holds no run.db. Runs in it: first, second\."):
        Run(tmp_path)
    with pytest.raises(DyndiagError, match="text: it is damaged, or no SQLite file"):
        Run(tmp_path / "text")
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_database_itself_will_do(tmp_path: Path) -> None:
    run = Run(record(tmp_path / "some run?#%41é") / "run.db")
    assert run.name == "some run?#%41é"
    assert run.folder == tmp_path / "some run?#%41é"
    assert list(run["train/loss"]) == [1.0]


def test_a_run_says_what_it_is(tmp_path: Path) -> None:
    record(tmp_path)
    assert repr(Run(tmp_path)) == f"<Run '{tmp_path}': 1 series, last step 0, 0 events>"


def test_an_unknown_series_is_told_with_its_nearest(tmp_path: Path) -> None:
    run = Run(record(tmp_path, **{"curvature/sharpness": 1.0, "gradients/norm": 2.0}))
    with pytest.raises(
        DyndiagError, match=r"no series 'sharpnes'\. Nearest: .*curvature/sharpness"
    ):
        run["sharpnes"]
    with pytest.raises(KeyError) as caught:
        run["nope"]
    assert str(caught.value) == (
        f"{tmp_path} has no series 'nope'. It has: curvature/sharpness, gradients/norm, train/loss."
    )
    with pytest.raises(DyndiagError, match=r"has no array 'curvature/sharpness'\. It has: none"):
        run.arrays("curvature/sharpness")
    assert "nope" not in run
    assert "train/loss" in run
    assert list(run) == run.names


def test_an_empty_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.db").touch()
    with pytest.raises(DyndiagError, match=r"run\.db is empty"):
        Run(tmp_path)


@pytest.mark.parametrize("kept", [50, 1000, 9000])
def test_a_truncated_database_is_told(tmp_path: Path, kept: int) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(step, {"train/loss": 1.0}) for step in range(5000)])
    os.truncate(tmp_path / "run.db", kept)
    with pytest.raises(DyndiagError, match=r"run\.db: it is damaged"):
        list(Run(tmp_path).rows())
    with pytest.raises(DyndiagError, match=r"run\.db: it is damaged"):
        Writer(tmp_path)


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_without_the_right_to_write_is_read_and_not_written(killed: bool) -> None:
    """As a user to whom it is not given: root may write anywhere."""
    script = dedent("""
        import os, shutil, sys
        from pathlib import Path
        from dyndiag.errors import DyndiagError
        from dyndiag.store import Run, Writer

        folder = Path(sys.argv[1]) / "run"
        writer = Writer(folder)
        writer.write([(step, {"train/loss": float(step)}) for step in range(9)])
        if KILLED:  # as kill -9 leaves it: the log beside the database
            folder = Path(shutil.copytree(folder, folder.with_name("killed")))
        writer.close()
        os.chmod(folder.parent, 0o755)
        for file in folder.iterdir():
            os.chmod(file, 0o444)
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.setuid(65534)
        held = sorted(os.listdir(folder))
        assert ("run.db-wal" in held) == KILLED, held
        run = Run(folder)
        assert [row["train/loss"] for _, row in run.rows()] == list(range(9))
        assert sorted(os.listdir(folder)) == held
        try:
            Writer(folder)
        except DyndiagError as error:
            print(error)
    """)
    with TemporaryDirectory() as folder:  # pytest's own is closed to others
        done = subprocess.run(
            [sys.executable, "-c", f"KILLED = {killed}\n{script}", folder],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "read-only" in done.stdout or "cannot be opened" in done.stdout, done.stdout
