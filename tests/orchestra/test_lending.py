"""Buffers that processes lend each other, here within one process; tests/federation has them between Ray's."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from flexifed.orchestra.lending import Borrower, Gpu, Lender
from flexifed.orchestra.wire import LentBuffer, PackedTensors

CPU = torch.device("cpu")


def lent(packed: PackedTensors) -> LentBuffer:
    assert isinstance(packed.buffer, LentBuffer)
    return packed.buffer


def test_a_reader_opens_a_buffer_once_and_then_sees_each_new_round() -> None:
    lender, borrower = Lender(CPU), Borrower()
    first = lender.pack("slot", [torch.ones(3), torch.tensor([True, False])])
    assert [one.tolist() for one in borrower.unpack(first)] == [[1.0, 1.0, 1.0], [True, False]]
    second = lender.pack("slot", [torch.full((3,), 2.0), torch.tensor([False, True])])
    assert lent(second) == LentBuffer(lent(first).name, None)
    assert [one.tolist() for one in borrower.unpack(second)] == [[2.0, 2.0, 2.0], [False, True]]


def test_each_reader_gets_a_handle_of_its_own_and_each_slot_a_buffer() -> None:
    lender = Lender(CPU)
    for slot in ("one", "other"):
        lender.write(slot, [torch.ones(3)])
    handles = [lent(lender.lend(slot, reader)).handle for slot in ("one", "other") for reader in (0, 1)]
    assert None not in handles
    assert {lent(lender.lend(slot, reader)).handle for slot in ("one", "other") for reader in (0, 1)} == {None}
    assert lent(lender.lend("one")).name != lent(lender.lend("other")).name


def test_other_shapes_take_another_buffer_and_leave_the_first_to_its_reader() -> None:
    lender, borrower = Lender(CPU), Borrower()
    (before,) = borrower.unpack(lender.pack("slot", [torch.ones(3)]))
    (after,) = borrower.unpack(lender.pack("slot", [torch.zeros(5)]))
    assert (before.tolist(), after.tolist()) == ([1.0] * 3, [0.0] * 5)


class FakeCuda:
    """What is asked of `torch.cuda` before a GPU is opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, uuid: str, initialized: bool, available: bool = True
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))


def test_a_driver_without_gpus_gets_to_see_its_clients_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, uuid="abc", initialized=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpu("node", "abc", visible="3").opened("node") == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("node", "uuid", "available"), [("other node", "abc", True), ("node", "another", True), ("node", "abc", False)]
)
def test_a_gpu_elsewhere_is_not_opened(monkeypatch: pytest.MonkeyPatch, node: str, uuid: str, available: bool) -> None:
    FakeCuda(monkeypatch, uuid=uuid, initialized=True, available=available)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert Gpu("node", "abc", visible="3").opened(node) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0", "CUDA has read it already"
