"""Devices, threads, dtypes, and a doctor that never falls ill itself."""

from __future__ import annotations

import sys

import pytest

from spatialt2i.core import device as device_module
from spatialt2i.core.device import autocast, cpu_count, describe_machine, pick_device, set_threads, torch_dtype

torch = pytest.importorskip("torch")


def test_auto_and_cpu_are_always_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["warp-drive", "cuda:99", "xla", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"device = {name!r}.*cpu"):
        pick_device(name)


def test_threads_are_set_and_zero_means_all() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
        set_threads(0)
        assert torch.get_num_threads() == cpu_count()
    finally:
        torch.set_num_threads(before)


def test_dtypes_and_autocast() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="dtype = 'float8': expected one of float32, bfloat16"):
        torch_dtype("float8")
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["device"] and machine["cores"] >= 1 and machine["memory_gb"] > 0
    assert "torch" in machine["versions"] and "torch" not in machine["missing"]


def test_missing_and_broken_packages_are_reported_and_not_fatal(monkeypatch) -> None:
    def absent(name: str) -> str:
        raise device_module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(device_module.metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    machine = describe_machine()
    assert machine["device"] is None and machine["versions"] == {}
    assert set(machine["missing"]) == set(device_module.NEEDED_FOR)
    assert "every model" in machine["missing"]["torch"]


def test_a_torch_that_cannot_be_imported_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "importing it fails" in describe_machine()["missing"]["torch"]
