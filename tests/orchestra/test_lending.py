"""Buffers that processes lend each other, tested within one process; tests/federation lends between Ray actors."""

from __future__ import annotations

import os
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexifed.orchestra.lending import Gpu, Lending, has_broken_gpu, lending_on
from flexifed.orchestra.wire import LentBuffer, PackedTensors

CPU = torch.device("cpu")
Ends = tuple[Lending, Lending]


def lent(packed: PackedTensors) -> LentBuffer:
    assert isinstance(packed.buffer, LentBuffer)
    return packed.buffer


@pytest.fixture
def ends() -> Ends:
    """The ends of two processes: a lender and a reader."""
    return Lending(CPU), Lending(CPU)


def sent(lender: Lending, *tensors: torch.Tensor, reader: str = "reader") -> PackedTensors:
    return lender.for_reader(lender.write(tensors), reader)


def test_a_reader_opens_a_buffer_once_and_then_sees_each_new_round(ends: Ends) -> None:
    lender, reader = ends
    first = sent(lender, torch.ones(3), torch.tensor([True, False]))
    assert [tensor.tolist() for tensor in reader.read(first)] == [[1.0, 1.0, 1.0], [True, False]]
    second = sent(lender, torch.full((3,), 2.0), torch.tensor([False, True]))
    assert lent(second) == replace(lent(first), handle=None)
    assert [tensor.tolist() for tensor in reader.read(second)] == [[2.0, 2.0, 2.0], [False, True]]


def test_each_reader_gets_one_handle_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[bytes] = []

    class Pickler(ForkingPickler):
        @classmethod
        def dumps(cls, *arguments: Any) -> memoryview:
            handles.append(bytes(ForkingPickler.dumps(*arguments)))
            return memoryview(handles[-1])

    monkeypatch.setattr("flexifed.orchestra.lending.ForkingPickler", Pickler)
    lender = Lending(CPU)
    written = lender.write([torch.ones(3)])
    packed = [lender.for_reader(written, reader) for reader in ("a", "b", "c", "a", "b")]
    assert [lent(message).handle for message in packed] == [*handles, None, None], "CUDA counts each of them"
    assert len(handles) == 3
    assert len({lent(message).lender for message in packed}) == 1
    assert all(Lending(CPU).read(message)[0].tolist() == [1.0] * 3 for message in packed[:3])


def test_a_larger_message_gets_a_new_buffer_that_replaces_the_first(ends: Ends) -> None:
    lender, reader = ends
    reader.read(sent(lender, torch.ones(3)))
    larger = sent(lender, torch.zeros(50))
    assert lent(larger).handle is not None
    assert reader.read(larger)[0].tolist() == [0.0] * 50
    assert len(reader._opened) == 1
    smaller = sent(lender, torch.ones(2))
    assert lent(smaller) == replace(lent(larger), handle=None), "the present buffer is large enough"
    assert reader.read(smaller)[0].tolist() == [1.0] * 2


@pytest.mark.parametrize("closed", [True, False])
def test_a_buffer_that_a_lost_reader_has_open_serves_the_next_one(ends: Ends, closed: bool) -> None:
    lender, reader = ends
    reader.read(sent(lender, torch.ones(3), reader="before"))
    buffer = lender._buffer
    reader.close()
    lender.give_back(closed=closed)
    again = sent(lender, torch.zeros(3), reader="after")
    assert (lender._buffer is buffer) == (not closed)
    assert reader.read(again)[0].tolist() == [0.0] * 3


def test_a_process_has_only_one_end_per_device() -> None:
    assert lending_on(CPU) is lending_on(torch.device("cpu"))


def test_a_gpu_that_does_not_answer_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    assert not has_broken_gpu(), "this process has not used one"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not has_broken_gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert has_broken_gpu()


class FakeCuda:
    """Replaces the functions of `torch.cuda` that open a GPU; without a `uuid` there is no GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, uuid: str | None, initialized: bool) -> None:
        self.uuid = uuid
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)

    def properties(self, _: int) -> SimpleNamespace:
        if self.uuid is None:
            raise RuntimeError("no CUDA here")
        return SimpleNamespace(uuid=self.uuid)


def set_visible(monkeypatch: pytest.MonkeyPatch, devices: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if devices is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)


@pytest.mark.parametrize("before", ["", None, "5"])
@pytest.mark.parametrize("visible", ["3", "MIG-1", None])
def test_a_driver_gets_to_see_its_clients_gpu(
    monkeypatch: pytest.MonkeyPatch, before: str | None, visible: str | None
) -> None:
    set_visible(monkeypatch, before)
    FakeCuda(monkeypatch, uuid="abc", initialized=False)
    assert Gpu("node", "abc", visible).opened() == torch.device("cuda", 0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(("uuid", "message"), [("another", "has GPU another, its clients abc"), (None, "no CUDA here")])
@pytest.mark.parametrize("before", ["", None, "5"])
@pytest.mark.parametrize("initialized", [True, False])
def test_a_gpu_that_can_not_be_opened_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch, uuid: str | None, message: str, before: str | None, initialized: bool
) -> None:
    set_visible(monkeypatch, before)
    FakeCuda(monkeypatch, uuid=uuid, initialized=initialized)
    with pytest.raises(RuntimeError, match=message):
        Gpu("node", "abc", visible="3").opened()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
