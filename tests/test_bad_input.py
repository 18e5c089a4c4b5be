"""Any invalid command line gives a typed error that names what is wrong, before anything is started.

Invalid lines are generated from the options themselves, so that a new option is tested as soon as it exists.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import ray
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flexifed import cli
from flexifed.config import (
    CellConfig,
    ModelConfig,
    NumericsConfig,
    PartitionConfig,
    PlacementOptions,
    SharingConfig,
    TrainingConfig,
)
from flexifed.errors import ConfigError
from flexifed.grid import GridOptions

SCRIPT = Path(__file__).parents[1] / "experiments" / "table1.py"
FEW = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=10_000)

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Nd"]), min_size=1, max_size=12).filter(
    lambda word: not word.startswith("-") and word == word.strip()
)
BAD_INTEGERS = st.one_of(
    st.integers(max_value=-1).map(str),
    st.integers(min_value=2**63).map(str),
    st.sampled_from(["", "0.5", "1e3", "0x10", "nan", "inf", "None", "True", "1,2", "--"]),
    WORDS,
)
COMMANDS = {"plan", "shares", "models", "data", "report", "export"}
NOT_NUMBERS = {"nan", "inf", "infinity", "n", "y"}
BAD_FLOATS = st.one_of(
    st.floats(max_value=-1e-9).map(str),
    st.sampled_from(["", "nan", "-nan", "inf", "-inf", "1e999", "0x1p3", "1,5", "None", "one"]),
    WORDS.filter(lambda word: word.lower() not in NOT_NUMBERS),
)


@dataclass(frozen=True)
class Option:
    """An option of a command: its name in messages, and its invalid values."""

    name: str
    bad: st.SearchStrategy[str]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options_of(command: type) -> Iterator[Option]:
    """Every option of a command that can have an invalid value, including the options of its groups."""
    hints = get_type_hints(command, include_extras=False)
    for field in fields(command):
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from options_of(kind)
        elif (bad := bad_values(kind)) is not None:
            yield Option(field.name, bad)


def bad_values(kind: Any) -> st.SearchStrategy[str] | None:
    """Invalid values of an option of this type; None if it accepts any value, or takes none."""
    if get_origin(kind) is Annotated:
        return bad_values(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [member for member in get_args(kind) if member is not types.NoneType]
        bad = bad_values(kinds[0])
        return bad.filter(lambda word: word != "None") if bad is not None else None
    if get_origin(kind) is Literal:
        return WORDS.filter(lambda word: word not in get_args(kind))
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return bad_values(get_args(kind)[0])
    if kind == tuple[int, ...]:
        return BAD_INTEGERS.filter(lambda word: word != "")
    return {int: BAD_INTEGERS, float: BAD_FLOATS}.get(kind)


TABLE1 = {option.name: option for option in options_of(GridOptions)}
PLAN = {option.name: option for option in options_of(cli.Plan)}
REPORT = {option.name: option for option in options_of(cli.Report)}
UNKNOWN = WORDS.filter(lambda word: "=" not in word and " " not in word).map(lambda word: f"--x{word}")

Line = tuple[list[str], set[str]]
"""The words of a line, and names at least one of which must be in the message."""


def test_all_options_that_take_a_value_are_tested() -> None:
    assert {
        "versions",
        "dirichlet_alpha",
        "rounds",
        "seeds",
        "profile",
        "data",
        "device",
        "width",
        "threads",
        "reduce_block",
    } <= set(TABLE1)
    assert {"learning_rate", "momentum", "num_clients", "gpus_per_client", "checkpoint_every", "scoring"} <= set(TABLE1)
    assert set(PLAN) >= {"family", "scheme", "num_clients", "num_classes", "width", "in_channels", "weighting"}
    assert set(REPORT) == {"pick", "format", "target"}


def named(option: Option) -> set[str]:
    """The ways in which a message may name an option."""
    return {option.flag, f"{option.name} is"}


def bad_option(options: dict[str, Option]) -> st.SearchStrategy[Line]:
    """An option with an invalid value."""
    return st.sampled_from(sorted(options)).flatmap(
        lambda name: options[name].bad.map(
            lambda value: ([options[name].flag, value], {f"{name} is", options[name].flag})
        )
    )


def unknown_option() -> st.SearchStrategy[Line]:
    return UNKNOWN.map(lambda word: ([word], {word}))


def no_value(options: dict[str, Option]) -> st.SearchStrategy[Line]:
    """An option at the end of the line, without its value."""
    return st.sampled_from(sorted(options)).map(lambda name: ([options[name].flag], {f"{name} is", options[name].flag}))


def bad_pattern() -> st.SearchStrategy[Line]:
    return WORDS.filter(lambda word: not {"*", "?", "["} & set(word)).map(lambda word: (["--only", word], {"--only"}))


def settings_that_do_not_fit() -> st.SearchStrategy[Line]:
    """Settings that are valid alone, but not together or with the data."""
    return st.one_of(
        st.tuples(st.integers(2, 5000), st.integers(1, 4999))
        .filter(lambda pair: pair[0] > pair[1])
        .map(lambda pair: (["--num-clients", str(pair[0]), "--num-shards", str(pair[1])], {"num_shards is"})),
        st.integers(10_001, 2**63 - 1).map(lambda count: (["--num-shards", str(count)], {"num_shards is"})),
        st.integers(7_000, 2**63 - 1).map(
            lambda count: (["--windows-per-shard", str(count)], {"windows_per_shard is"})
        ),
        st.integers(2, 7).map(
            lambda count: (["--reduce-block", "8", "--clients-per-actor", str(count)], {"clients_per_actor is"})
        ),
        st.integers(0, 99).map(lambda seed: (["--seeds", str(seed), str(seed)], {"seeds is"})),
        st.sampled_from(
            [(["--data", "real"], {"cifar10"}), (["--seeds"], {"seeds is"}), (["--profile"], {"profile is"})]
        ),
        st.just((["--data", "synthetic", "--download"], {"download"})),
    )


def table1_lines() -> st.SearchStrategy[Line]:
    mistake = st.one_of(
        bad_option(TABLE1), bad_option(TABLE1), unknown_option(), bad_pattern(), settings_that_do_not_fit()
    )
    several = st.lists(mistake, min_size=1, max_size=3).map(joined)
    return st.one_of(several, several, several, no_value(TABLE1))


def flexifed_lines() -> st.SearchStrategy[Line]:
    plan = st.lists(bad_option(PLAN) | unknown_option(), min_size=1, max_size=3).map(joined)
    complete = ["plan", "--family", "vgg", "--scheme", "max_common"]
    return st.one_of(
        (plan | no_value(PLAN)).map(lambda line: ([*complete, *line[0]], line[1])),
        (bad_option(REPORT) | unknown_option()).map(lambda line: (["report", *line[0]], line[1])),
        WORDS.map(lambda word: (["report", f"nowhere/{word}"], {"nowhere"})),
        WORDS.filter(lambda word: word not in ("plan", "models", "shares", "data", "report", "export")).map(
            lambda word: ([word], {word})
        ),
        st.sampled_from([([], {"plan"}), (["plan"], {"--family"}), (["plan", "--family", "vgg"], {"--scheme"})]),
    )


def joined(parts: Sequence[Line]) -> Line:
    """Join lines into one. After the word `--` nothing is an option, and the message names words as they are."""
    line = [word for words, _ in parts for word in words]
    after = line[line.index("--") + 1 :] if "--" in line else []
    return line, {name for _, names in parts for name in names} | {word for word in after if word.startswith("-")}


@pytest.fixture(scope="module")
def table1() -> Callable[[Sequence[str]], int]:
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("Ray was reached")

    monkeypatch.setattr(ray, "init", refuse)
    for name in ("RAY_ADDRESS", "FLEXIFED_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)


def check_refused(main: Callable[[Sequence[str]], int], line: Line) -> None:
    words, names = line
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    message = squeezed(stderr.getvalue())
    assert status == 2, f"{words}: status {status}, {stderr.getvalue()}"
    assert "Traceback" not in message
    assert any(squeezed(name) in message for name in names), f"{words}: {stderr.getvalue()}"
    assert not list(Path().rglob("*.parquet"))


def squeezed(text: str) -> str:
    """The text without whitespace and the lines of boxes, since long messages are wrapped."""
    return "".join(text.replace("│", " ").split())


@example(line=joined([(["--seeds", "--"], {"seeds is"}), (["--num-shards", "10001"], {"num_shards is"})]))
@FEW
@given(line=table1_lines())
def test_an_invalid_line_of_the_experiment_is_refused_by_name(
    table1: Callable[[Sequence[str]], int], line: Line
) -> None:
    check_refused(table1, line)


@FEW
@given(line=flexifed_lines())
def test_an_invalid_line_of_the_tool_is_refused_by_name(line: Line) -> None:
    check_refused(cli.main, line)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(line=st.one_of(table1_lines().map(lambda line: ("table1", line)), flexifed_lines().map(lambda line: ("", line))))
def test_ten_thousand_invalid_lines(table1: Callable[[Sequence[str]], int], line: tuple[str, Line]) -> None:
    command, words = line
    check_refused(table1 if command else cli.main, words)


CONFIGS = (ModelConfig, PartitionConfig, TrainingConfig, SharingConfig, NumericsConfig, PlacementOptions)
INVALID_VALUES = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.integers(max_value=-1),
    st.integers(min_value=2**63),
    st.just(float("nan")),
    st.just(float("inf")),
    st.just(-0.5),
    st.complex_numbers(),
)


@settings(FEW, max_examples=500)
@given(data=st.data())
def test_a_config_refuses_invalid_values_by_field_name(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(CONFIGS), "config")
    field = data.draw(st.sampled_from([field.name for field in fields(kind)]), "field")
    hints = get_type_hints(kind)
    valid = get_args(hints[field])
    value = data.draw(INVALID_VALUES.filter(lambda value: not isinstance(value, str) or value not in valid), "value")
    if value is None and types.NoneType in valid:
        return
    if hints[field] in (float, float | None) and isinstance(value, int) and value > 0:
        return  # a large integer is a valid float where the field has no upper bound
    with pytest.raises(ConfigError, match=field):
        kind(**{field: value})


@settings(FEW, max_examples=200)
@given(
    field=st.sampled_from(["dataset", "family", "scheme", "seed", "device"]),
    value=INVALID_VALUES.filter(lambda value: value not in ("cpu", "cuda")),
)
def test_a_cell_refuses_invalid_values_by_field_name(field: str, value: object) -> None:
    values: dict[str, Any] = {"dataset": "cifar10", "family": "vgg", "scheme": "standalone", field: value}
    with pytest.raises(ConfigError, match=field):
        CellConfig(**values)
