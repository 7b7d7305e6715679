"""What a write returned from is kept: after kill -9, on a full disk, beside readers and forks."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from textwrap import dedent

import pytest

from dyndiag.store import Run, Writer

ROOT = Path(__file__).parents[2]


def python(script: str, *arguments: object) -> str:
    """Run a script in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", ["wal", "truncate"])
def test_kill_loses_no_row_that_was_acknowledged(tmp_path: Path, mode: str) -> None:
    """25 writers a journal mode, each killed at a random moment; a warm parent forks them."""
    printed = python(KILLS, tmp_path, mode)
    runs, acknowledged = map(int, printed.split())
    assert runs >= 16  # those that are killed only after their first write have a file for sure
    assert acknowledged > 100  # or nothing was tested


KILLS = """
    import os, random, signal, sqlite3, sys, time
    from contextlib import closing
    from pathlib import Path
    from dyndiag.store import Run, Writer, writer

    tmp_path, mode = Path(sys.argv[1]), sys.argv[2]
    writer.journal_mode = lambda folder: mode

    def row(step):
        return {f"{area}/{part}": step + part / 8 for area in "ab" for part in range(step % 5 + 2)}

    def train(folder, acknowledge):
        rest = random.Random(str(folder))
        run = Writer(folder)
        step = run.next_step
        while True:
            count = rest.randrange(1, 40)
            run.write([(step + k, row(step + k)) for k in range(count)])
            step += count
            os.write(acknowledge, b"%d\\n" % step)

    rest, total, runs = random.Random(0), 0, 0
    for number in range(25):
        folder = tmp_path / str(number // 2)  # every second one goes on with a killed run
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            train(folder, said)
        os.close(said)
        if number % 3:  # at any moment of its life, or of its writing
            os.read(heard, 1)
        time.sleep(rest.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(heard, "rb") as said:
            last = max(map(int, said.read().split()), default=0)
        if not (folder / "run.db").exists():
            continue
        with closing(Writer(folder)) as run:  # the lock is free, the format whole
            assert run.next_step >= last, (run.next_step, last)
            last = run.next_step
        if last:
            assert list(Run(folder).rows()) == [(step, row(step)) for step in range(last)]
        with closing(sqlite3.connect(folder / "run.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        total, runs = total + last, runs + 1
    print(runs, total)
"""


def test_a_killed_commit_is_undone_by_the_reader(tmp_path: Path) -> None:
    """On network disks: a rollback journal that nobody owns any more."""
    python(
        """
        import os, sqlite3, sys
        from pathlib import Path
        from dyndiag.store import Writer, writer

        writer.journal_mode = lambda folder: "truncate"
        run = Writer(Path(sys.argv[1]))
        run.write([(step, {"train/loss": 1.0}) for step in range(2000)])
        run._db.execute("PRAGMA cache_size = 1")  # so that pages go to the disk before the commit
        run._db.execute("BEGIN")
        run._db.execute("UPDATE train SET loss = 2.0")
        os.kill(os.getpid(), 9) if os.fork() == 0 else os._exit(os.wait()[1] * 0)
        """,
        tmp_path,
    )
    assert (tmp_path / "run.db-journal").stat().st_size > 0
    assert set(Run(tmp_path)["train/loss"]) == {1.0}


def test_a_full_disk_is_told_and_the_same_rows_can_be_written_later(tmp_path: Path) -> None:
    """A limit on the size of files is a disk that fills up, and is then cleared."""
    printed = python(
        """
        import resource, sys
        from pathlib import Path
        from dyndiag.errors import DyndiagError
        from dyndiag.store import Run, Writer

        folder = Path(sys.argv[1])
        def rows(steps):
            return [(k, {f"train/{part}": k + part / 32 for part in range(30)}) for k in steps]

        run = Writer(folder)
        run.write(rows(range(100)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        step, refused = 100, 0
        while refused < 3:
            try:
                run.write(rows(range(step, step + 50)) + [(step, {f"new/{refused}": 1.0})])
                assert refused == 0
                step += 50
            except DyndiagError as error:
                print(error)
                refused += 1
                assert list(Run(folder).rows())[-1][0] == step - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.write(rows(range(step, step + 50)) + [(step, {"new/2": 1.0, "new/3": 1.0})])
        run.close()
        found = dict(Run(folder).rows())
        assert found.pop(step) == dict(rows([step]))[step] | {"new/2": 1.0, "new/3": 1.0}
        expected = dict(rows(range(step + 50)))
        del expected[step]
        found = {k: {n: v for n, v in row.items() if n[:3] != "new"} for k, row in found.items()}
        assert found == expected
        """,
        tmp_path,
    )
    assert len(set(printed.splitlines())) == 1
    assert "run.db: the disk refused (full, over a quota, or gone)" in printed


def test_a_disk_that_is_full_at_the_end_keeps_what_was_written(tmp_path: Path) -> None:
    python(
        """
        import resource, sys
        from pathlib import Path
        from dyndiag.store import Run, Writer

        run = Writer(Path(sys.argv[1]))
        run.write([(step, {"train/loss": float(step)}) for step in range(9999)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        run.close()
        """,
        tmp_path,
    )
    assert list(Run(tmp_path)["train/loss"]) == list(range(9999))
    with closing(Writer(tmp_path)) as writer:
        assert writer.next_step == 9999


def test_reading_while_another_process_writes(tmp_path: Path) -> None:
    """Each look sees whole rows without a gap, and later looks see more."""
    script = """
        import sys
        from pathlib import Path
        from dyndiag.store import Writer

        run = Writer(Path(sys.argv[1]))
        run.write([(0, {"a/x": 0.0, "b/x": 0.0})])
        print("ready", flush=True)
        for step in range(1, 1_000_000):
            run.write([(step, {"a/x": float(step), "b/x": float(step)})])
    """
    with subprocess.Popen(
        [sys.executable, "-c", dedent(script), str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as training:
        try:
            assert training.stdout is not None
            training.stdout.readline()
            run = Run(tmp_path)
            lengths = []
            for _ in range(15):
                rows = list(run.rows())
                assert rows == [(k, {"a/x": float(k), "b/x": float(k)}) for k in range(len(rows))]
                series = run["b/x"]
                assert list(series) == list(range(len(series)))
                lengths += [len(rows), len(series)]
            assert training.poll() is None
        finally:
            training.kill()
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]


def test_a_fork_neither_holds_the_run_nor_harms_it(tmp_path: Path) -> None:
    """A data loader's worker may outlive the training process, or end before it."""
    python(
        """
        import os, signal, sys, time
        from pathlib import Path
        from dyndiag.errors import DyndiagError
        from dyndiag.store import Run, Writer

        folder = Path(sys.argv[1])
        heard, said = os.pipe()
        training = os.fork()
        if training == 0:
            run = Writer(folder)
            run.write([(0, {"train/loss": 0.0})])
            worker = os.fork()
            if worker == 0:
                try:
                    run.write([(1, {"train/loss": -1.0})])
                except DyndiagError as error:
                    assert "fork" in str(error)
                    run.close()
                    del run
                    os._exit(0)
            assert os.waitpid(worker, 0)[1] == 0
            run.write([(1, {"train/loss": 1.0})])
            worker = os.fork()
            if worker:
                os.write(said, b"%d " % worker)
            while True:
                time.sleep(1)
        worker = int(os.read(heard, 99))
        try:
            Writer(folder)
            raise AssertionError("the second writer was let in")
        except DyndiagError as error:
            assert "another monitor" in str(error)
        os.kill(training, signal.SIGKILL)
        os.waitpid(training, 0)
        os.kill(worker, 0)  # it lives
        run = Writer(folder)
        os.kill(worker, signal.SIGKILL)
        assert run.next_step == 2
        run.close()
        assert list(Run(folder)["train/loss"]) == [0.0, 1.0]
        """,
        tmp_path,
    )


def test_a_reader_in_the_writers_process_does_not_free_its_lock(tmp_path: Path) -> None:
    """POSIX drops a process's locks on a file when it closes the file anywhere."""
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0})])
        run = Run(tmp_path)
        assert len(run["train/loss"]) == 1
        python(
            """
            import sys
            from dyndiag.store import Run
            Run(sys.argv[1]).names
            """,
            tmp_path,
        )
        assert (tmp_path / "run.db-wal").exists()
        writer.write([(1, {"train/loss": 1.0})])
        assert len(run["train/loss"]) == 2


def test_looking_at_a_run_makes_no_file(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0})])
    # As if only the database had been copied while it was written: its header says there is a log.
    with closing(Writer(tmp_path)) as writer:
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "run.db").write_bytes((tmp_path / "run.db").read_bytes())
    for folder in (tmp_path, tmp_path / "copy"):
        held = sorted(os.listdir(folder))
        run = Run(folder)
        assert len(run["train/loss"]) == 1
        assert sorted(os.listdir(folder)) == held
