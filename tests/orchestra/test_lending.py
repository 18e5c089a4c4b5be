"""Buffers that processes lend each other, here within one process; tests/federation has them between Ray's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from flexifed.orchestra import lending
from flexifed.orchestra.lending import Gpu, Lending, give_back
from flexifed.orchestra.wire import LentBuffer, PackedTensors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_lent() -> Iterator[None]:
    give_back()
    yield
    give_back()


def lent(packed: PackedTensors) -> LentBuffer:
    assert isinstance(packed.buffer, LentBuffer)
    return packed.buffer


def test_a_reader_opens_a_buffer_once_and_then_sees_each_new_round() -> None:
    lender, reader = Lending(CPU), Lending(CPU)
    first = lender.pack([torch.ones(3), torch.tensor([True, False])])
    assert [one.tolist() for one in reader.unpack(first)] == [[1.0, 1.0, 1.0], [True, False]]
    second = lender.pack([torch.full((3,), 2.0), torch.tensor([False, True])])
    assert lent(second) == LentBuffer(lent(first).name, None)
    assert [one.tolist() for one in reader.unpack(second)] == [[2.0, 2.0, 2.0], [False, True]]


def test_each_reader_gets_one_handle_of_its_own() -> None:
    lender = Lending(CPU)
    written = lender.write([torch.ones(3)])
    packed = [lender.lend(written, reader) for reader in (0, 1, 2, 0, 1)]
    assert [lent(one).handle is None for one in packed] == [False, False, False, True, True]
    assert len({lent(one).name for one in packed}) == 1
    assert all(Lending(CPU).unpack(one)[0].tolist() == [1.0] * 3 for one in packed[:3])


def test_what_needs_more_room_takes_another_buffer_and_leaves_the_first_to_its_reader() -> None:
    lender, reader = Lending(CPU), Lending(CPU)
    (before,) = reader.unpack(lender.pack([torch.ones(3)]))
    (after,) = reader.unpack(lender.pack([torch.zeros(5)]))
    assert (before.tolist(), after.tolist()) == ([1.0] * 3, [0.0] * 5)


def test_the_next_cell_lends_the_same_buffer_under_another_name_until_it_is_given_back() -> None:
    first, second = (lent(Lending(CPU).pack([torch.ones(3)])) for _ in range(2))
    assert first.name != second.name
    assert second.handle is not None
    (buffer,) = lending._buffers.values()
    give_back()
    Lending(CPU).pack([torch.ones(3)])
    assert buffer is not lending._buffers[CPU]


class FakeCuda:
    """What is asked of `torch.cuda` when a GPU is opened; without a `uuid` there is none."""

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


@pytest.mark.parametrize(("uuid", "said"), [("another", "has GPU another, its clients abc"), (None, "no CUDA here")])
@pytest.mark.parametrize("before", ["", None, "5"])
@pytest.mark.parametrize("initialized", [True, False])
def test_a_gpu_that_can_not_be_opened_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch, uuid: str | None, said: str, before: str | None, initialized: bool
) -> None:
    set_visible(monkeypatch, before)
    FakeCuda(monkeypatch, uuid=uuid, initialized=initialized)
    with pytest.raises(RuntimeError, match=said):
        Gpu("node", "abc", visible="3").opened()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
