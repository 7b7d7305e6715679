"""The journal suits the disk."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path, PurePosixPath

import pytest

from dyndiag.store import Run, Writer
from dyndiag.store.disks import file_system, journal_mode

MOUNTS = """\
/dev/vda / ext4 rw 0 0
proc /proc proc rw 0 0
nas:/home /home nfs4 rw,relatime 0 0
tmpfs /home/local tmpfs rw 0 0
//pc/share /mnt/a\\040b cifs rw 0 0
old /data ext4 rw 0 0
new /data fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/root/runs", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs/x", "nfs4"),
        ("/homely", "ext4"),
        ("/home/local/x", "tmpfs"),
        ("/mnt/a b/x", "cifs"),
        ("/data/x", "fuse.sshfs"),
    ],
)
def test_the_deepest_and_last_mount_holds_a_path(path: str, kind: str) -> None:
    assert file_system(PurePosixPath(path), MOUNTS) == kind


def test_this_disk_is_local(tmp_path: Path) -> None:
    assert journal_mode(tmp_path) == "wal"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("nfs", "truncate"), ("nfs4", "truncate"), ("fuse", "truncate"), ("fuse.s3fs", "truncate"),
     ("smb3", "truncate"), ("ext4", "wal"), ("overlay", "wal"), ("xfs", "wal"), ("fuseblk", "wal")],
)  # fmt: skip
def test_network_disks_get_a_rollback_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"disk / {kind} rw 0 0\n")
    assert journal_mode(tmp_path) == mode


def test_a_run_on_a_network_disk_keeps_no_log_and_one_commit_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0})])
    monkeypatch.setattr("dyndiag.store.writer.journal_mode", lambda folder: "truncate")
    with closing(Writer(tmp_path)) as writer:
        with closing(sqlite3.connect(tmp_path / "run.db")) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        writer.write([(step, {"train/loss": 2.0}) for step in range(1, 9)])
        assert not (tmp_path / "run.db-wal").exists()
        assert len(Run(tmp_path)["train/loss"]) == 9
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.db", "run.db-lock"]
