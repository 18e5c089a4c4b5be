"""What computed which rounds of a run."""

from __future__ import annotations

from typing import Any

from flexifed.cells.provenance import merge_attempts


def provenance(processor: str) -> dict[str, Any]:
    return {"machine": "Linux x86_64 host", "versions": {"torch": "2.11.0"}, "computed_on": [processor]}


def stored(*attempts: tuple[int, str]) -> dict[str, Any]:
    """Metadata of a file whose rounds were computed on these processors, each from a round on."""
    entries = [{"from_round": first, **provenance(processor)} for first, processor in attempts]
    return {**entries[0], "attempts": entries}


def rounds_of(attempts: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(attempt["from_round"], attempt["computed_on"][0]) for attempt in attempts]


def test_other_hardware_is_another_attempt() -> None:
    attempts, has_changed = merge_attempts(provenance("Xeon"), stored((0, "EPYC")), 5)
    assert rounds_of(attempts) == [(0, "EPYC"), (5, "Xeon")]
    assert has_changed


def test_the_same_hardware_is_not() -> None:
    attempts, has_changed = merge_attempts(provenance("EPYC"), stored((0, "EPYC")), 5)
    assert rounds_of(attempts) == [(0, "EPYC")]
    assert not has_changed


def test_a_package_that_only_one_of_them_lists_is_no_other_version() -> None:
    now = provenance("EPYC")
    now["versions"] = {**now["versions"], "torchaudio": "2.11.0"}
    assert not merge_attempts(now, stored((0, "EPYC")), 5)[1]
    now["versions"]["torch"] = "2.11.1"
    assert merge_attempts(now, stored((0, "EPYC")), 5)[1]


def test_rounds_that_are_played_again_are_of_the_last_attempt_alone() -> None:
    before = stored((0, "EPYC"), (5, "Xeon"), (9, "EPYC"))
    attempts, has_changed = merge_attempts(provenance("Other"), before, 5)
    assert rounds_of(attempts) == [(0, "EPYC"), (5, "Other")]
    assert has_changed


def test_a_run_that_begins_again_has_one_attempt() -> None:
    attempts, has_changed = merge_attempts(provenance("Xeon"), stored((0, "EPYC")), 0)
    assert rounds_of(attempts) == [(0, "Xeon")]
    assert not has_changed
