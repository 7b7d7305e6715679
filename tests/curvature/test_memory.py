"""Memory is asked for before it is taken, and a basis that does not fit is made to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dyndiag.curvature import Operator, eigenpairs, memory
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import counted, of_diagonal

CPU = torch.device("cpu")
SPECTRUM = np.r_[np.linspace(0, 1, 298), 1.1, 1.2]


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A Linux with 8 GiB available."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 << 20} kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def limited(system: Path, limit: str) -> None:
    group = system / "sys/fs/cgroup"
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{3 << 30}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 30}\n")


class TestFree:
    def test_on_linux(self, system):
        assert memory._free_on_linux(system) == 8 << 30

    @pytest.mark.parametrize(
        ("limit", "free"), [("max", 8), (str(6 << 30), 4), (str(60 << 30), 8), (str(1 << 30), 0)]
    )
    def test_in_a_container(self, system, limit, free):
        """What the files in its cache take can be had back."""
        limited(system, limit)
        assert memory._free_on_linux(system) == free << 30

    def test_elsewhere_nothing_is_known_and_nothing_refused(self, tmp_path, monkeypatch):
        assert memory._free_on_linux(tmp_path) is None
        assert memory.free_bytes(torch.device("meta")) is None
        monkeypatch.setattr(memory, "free_bytes", lambda device: None)
        assert memory.vectors_that_fit(10**15, torch.float32, CPU) is None
        memory.require(9, 10**15, torch.float32, CPU, "a test")
        assert eigenpairs(of_diagonal(SPECTRUM)).converged

    def test_on_a_gpu_the_allocators_own_reserve_counts(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9999))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
        assert memory.free_bytes(torch.device("cuda:0")) == 1300

    def test_here(self):
        free = memory.free_bytes(CPU)
        assert free is None or 2**20 < free < 2**50


def room_for(vectors: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = int(vectors * size * 8 / 0.8) + 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


class TestEigenpairs:
    def test_a_basis_that_does_not_fit_restarts(self, monkeypatch):
        operator = of_diagonal(SPECTRUM)
        plain = eigenpairs(operator)
        room_for(12 + 4, 300, monkeypatch)
        bounded = eigenpairs(operator)
        assert bounded.converged
        assert torch.equal(bounded.vectors, eigenpairs(operator, max_basis=12).vectors)
        assert plain.products < bounded.products

    def test_one_that_was_asked_for_is_refused(self, monkeypatch):
        operator, calls = counted(of_diagonal(SPECTRUM))
        room_for(12 + 4, 300, monkeypatch)
        sentence = (
            r"not enough memory for 1 eigenpair from a basis of 13: 17 vectors of 300 numbers take "
            r"3.8e-05 GiB, but of the 4.47e-05 GiB free on cpu only 80% may go to vectors"
        )
        with pytest.raises(DyndiagError, match=sentence):
            eigenpairs(operator, max_basis=13)
        assert not calls

    def test_so_is_what_no_restart_can_help(self, monkeypatch):
        room_for(4 + 3, 300, monkeypatch)
        with pytest.raises(DyndiagError, match=r"basis of 4: 8 vectors of 300 numbers"):
            eigenpairs(of_diagonal(SPECTRUM))

    def test_before_anything_is_allocated(self):
        """4 TB: were it not refused, this test would not come back."""
        huge = Operator(lambda v: v, 10**12, torch.float32, CPU)
        if memory.free_bytes(CPU) is None:
            pytest.skip("the system does not tell how much memory is free")
        with pytest.raises(DyndiagError, match=r"1,000,000,000,000 numbers take 2.98e\+04 GiB"):
            eigenpairs(huge)
