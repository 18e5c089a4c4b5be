"""Overlapping computations have the results that they have alone. Without a GPU they alternate on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexifed.training.numerics import seeded_dropout
from flexifed.training.streams import Steps, Stream, overlap, run_to_end

CPU = torch.device("cpu")


def draws(seed: int, count: int) -> Steps[list[float]]:
    """Draw from the seeded global generator, as a client does, and yield after each number."""
    numbers = []
    with seeded_dropout(seed, CPU):
        for _ in range(count):
            numbers.append(torch.rand(()).item())
            yield
    return numbers


def streams(count: int) -> list[Stream]:
    return [Stream(CPU) for _ in range(count)]


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 6)), min_size=1, max_size=5))
def test_computations_that_overlap_draw_what_they_draw_alone(computations: list[tuple[int, int]]) -> None:
    alone = [run_to_end(draws(*arguments)) for arguments in computations]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert overlap([draws(*arguments) for arguments in computations], streams(5)) == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failure_ends_the_other_computations_and_restores_the_generator() -> None:
    ended = []

    def endless() -> Steps[None]:
        try:
            with seeded_dropout(1, CPU):
                while True:
                    yield
        finally:
            ended.append(True)

    def failing() -> Steps[None]:
        yield
        raise ArithmeticError("too large")

    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="too large"):
        overlap([endless(), failing(), endless()], streams(3))
    assert ended == [True, True]
    assert torch.equal(torch.get_rng_state(), before)


class FakeStreams:
    """A fake of what streams use of `torch.cuda`. Records the order in which streams wait and get work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.made = 0
        self.current = "outside"
        fakes = {
            "Stream": self.make_stream,
            "current_stream": lambda device: self.stream("outside"),
            "stream": self.entered,
            "get_rng_state": lambda device: torch.zeros(1),
            "set_rng_state": lambda state, device: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.order.append(f"{name} waits for {other.name}"))

    def make_stream(self, device: torch.device) -> SimpleNamespace:
        self.made += 1
        return self.stream(f"stream {self.made}")

    @contextmanager
    def entered(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def work(self, count: int) -> Steps[None]:
        for _ in range(count):
            self.order.append(f"work on {self.current}")
            yield


BEGIN = ["stream 1 waits for outside", "stream 2 waits for outside"]
END = ["outside waits for stream 1", "outside waits for stream 2"]


def test_streams_wait_for_earlier_work_and_later_work_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeStreams(monkeypatch)
    streams = [Stream(torch.device("cuda")) for _ in range(2)]
    overlap([cuda.work(2), cuda.work(1)], streams)
    assert cuda.order == [*BEGIN, "work on stream 1", "work on stream 2", "work on stream 1", *END]


def test_later_work_waits_for_all_streams_even_if_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Steps[None]:
        yield
        raise ArithmeticError("too large")

    cuda = FakeStreams(monkeypatch)
    streams = [Stream(torch.device("cuda")) for _ in range(2)]
    with pytest.raises(ArithmeticError):
        overlap([cuda.work(9), failing()], streams)
    assert cuda.order[-2:] == END


def test_steps_are_taken_in_turn() -> None:
    taken: list[str] = []

    def steps(name: str, count: int) -> Iterator[None]:
        for _ in range(count):
            taken.append(name)
            yield

    overlap([steps("a", 3), steps("b", 1), steps("c", 2)], streams(3))  # type: ignore[list-item]
    assert taken == ["a", "b", "c", "a", "c", "a"]
