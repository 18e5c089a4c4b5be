"""Computations that overlap come to what they come to alone. Where there is no GPU they take turns on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexifed.training.numerics import seeded_dropout
from flexifed.training.streams import Steps, Stream, overlap, run

CPU = torch.device("cpu")


def draws(seed: int, count: int) -> Steps[list[float]]:
    """What a client does: seeded draws from the global generator, with a turn for others between them."""
    found = []
    with seeded_dropout(seed, CPU):
        for _ in range(count):
            found.append(torch.rand(()).item())
            yield
    return found


def streams(count: int) -> list[Stream]:
    return [Stream(CPU) for _ in range(count)]


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 6)), min_size=1, max_size=5))
def test_computations_that_overlap_draw_what_they_draw_alone(computations: list[tuple[int, int]]) -> None:
    alone = [run(draws(*one)) for one in computations]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert overlap([draws(*one) for one in computations], streams(5)) == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_one_that_fails_ends_the_others_and_leaves_the_generator_as_it_was() -> None:
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


def test_steps_are_taken_in_turn() -> None:
    taken: list[str] = []

    def steps(name: str, count: int) -> Iterator[None]:
        for _ in range(count):
            taken.append(name)
            yield

    overlap([steps("a", 3), steps("b", 1), steps("c", 2)], streams(3))  # type: ignore[list-item]
    assert taken == ["a", "b", "c", "a", "c", "a"]
