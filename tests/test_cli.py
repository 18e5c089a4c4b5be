from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal
from torch import nn

from flexifed.cli import main
from flexifed.config import FAMILIES, SCHEMES, CellConfig, NumericsConfig
from flexifed.core.schemes import SharingPlan, sharing_plan
from flexifed.core.signature import DeclaredLayer
from flexifed.data import SOURCES, download
from flexifed.models import build_model, input_kind
from flexifed.profiles import PROFILES
from flexifed.report.plan import Branch, Segment, plan_summary
from flexifed.report.plan_text import percent, segment_text
from flexifed.report.study import load_results
from flexifed.results.rounds_file import RoundsWriter
from flexifed.results.store import ResultsFolder

WIDTH = 0.0625


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def thin_plan(scheme: str, num_clients: int = 8, **options: Any) -> tuple[SharingPlan, list[str]]:
    names = [FAMILIES["vgg"][client % 4] for client in range(num_clients)]
    built = {name: build_model(name, num_classes=10, width=WIDTH, device="meta") for name in set(names)}
    return sharing_plan([built[name] for name in names], scheme, **options), names


def run_plan(capsys: pytest.CaptureFixture[str], scheme: str, *options: str) -> str:
    assert main(["plan", "--family", "vgg", "--scheme", scheme, "--width", str(WIDTH), *options]) == 0
    return capsys.readouterr().out


# plan


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", [[], ["--batch-norm-buffers", "local"], ["--classifier", "always"]])
def test_json_agrees_with_the_plan(capsys: pytest.CaptureFixture[str], scheme: str, options: list[str]) -> None:
    plan_options = (
        {"batch_norm_buffers": "local"} if "local" in options else {"classifier": "always"} if options else {}
    )
    plan, names = thin_plan(scheme, **plan_options)
    content = json.loads(run_plan(capsys, scheme, "--json", *options))
    assert [version["model"] for version in content["versions"]] == list(FAMILIES["vgg"])
    assert content["scheme"] == scheme
    for version in content["versions"]:
        for client in version["clients"]:
            parameters = dict(build_model(names[client], num_classes=10, width=WIDTH, device="meta").named_parameters())
            total = sum(parameter.numel() for parameter in parameters.values())
            averaged = [name for shared in plan.shared_names(client).values() for name in shared if name in parameters]
            share = sum(parameters[name].numel() for name in averaged) / total
            assert version["num_parameters"] == total
            assert version["averaged_share"] == pytest.approx(share)
            assert sum(part["share"] for part in version["averaged_over"]) == pytest.approx(share)
            assert version["bytes_up"] == version["bytes_down"] == plan.bytes_per_round(client)
    for group, description in zip(plan.groups, content["groups"], strict=True):
        assert description["group"] == group.index
        assert description["clients"] == list(plan.members(group))
        assert description["num_bytes"] == group.num_bytes
    for row, version in zip(plan.group_of, content["versions"], strict=True):
        assert [layer["group"] for layer in version["layers"]] == list(row)
        for depth, layer in enumerate(version["layers"]):
            assert layer["depth"] == depth
            members = content["groups"][layer["group"]]["clients"] if layer["group"] is not None else [None]
            assert layer["num_clients"] == len(members)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_shows_shares_and_bytes(capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    text = run_plan(capsys, scheme)
    plan, names = thin_plan(scheme)
    summary = plan_summary(plan, names)
    for version in summary.versions:
        [row] = [line for line in text.splitlines() if version.model in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        first = version.averaged_over[0] if version.averaged_over else None
        over = f"{percent(first.share)} over {first.num_clients}" if first else "-"
        expected = [
            f"2 × {version.version.upper()}",
            version.model,
            f"{version.num_parameters:,}",
            percent(version.averaged_share),
        ]
        assert cells == [*expected, over, decimal(plan.bytes_per_round(version.clients[0]))]
    together = sum(plan.bytes_per_round(client) for client in range(8))
    assert f"all 8 clients together send {decimal(together)}" in text


def test_tree_of_max_common(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip("│├└─ ") for line in run_plan(capsys, "max_common").splitlines()]
    start = lines.index("V1 V2 V3 V4")
    assert lines[start : start + 17] == [
        "V1 V2 V3 V4",
        "layer 1 · conv 4 · averaged over V1 V2 V3 V4 (8 clients)",
        "V1",
        "layers 2-8 · conv 8..32 · averaged over V1 (2 clients)",
        "layers 9-11 · linear 256..10 · averaged over V1 (2 clients)",
        "V2 V3 V4",
        "layers 2-6 · conv 4..16 · averaged over V2 V3 V4 (6 clients)",
        "V2",
        "layers 7-10 · conv 32 · averaged over V2 (2 clients)",
        "layers 11-13 · linear 256..10 · averaged over V2 (2 clients)",
        "V3 V4",
        "layer 7 · conv 16 · averaged over V3 V4 (4 clients)",
        "V3",
        "layers 8-13 · conv 32 · averaged over V3 (2 clients)",
        "layers 14-16 · linear 256..10 · averaged over V3 (2 clients)",
        "V4",
        "layers 8-16 · conv 16..32 · averaged over V4 (2 clients)",
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_clients", [1, 3, 7, 8])
def test_tree_has_every_layer_once_with_its_members(scheme: str, num_clients: int) -> None:
    plan, names = thin_plan(scheme, num_clients)
    averaged_with: dict[tuple[int, int], set[int]] = {}
    for segment, versions in segments(plan_summary(plan, names).tree):
        for depth in range(segment.first, segment.last + 1):
            for architecture in versions:
                [members] = [
                    set(group.versions) for group in segment.averaged if f"v{architecture + 1}" in group.versions
                ] or [set()]
                assert (not members) == (f"v{architecture + 1}" in segment.personal)
                assert (architecture, depth) not in averaged_with
                averaged_with[architecture, depth] = {int(name[1:]) - 1 for name in members}
    assert averaged_with == {
        (architecture, depth): set() if index is None else set(plan.groups[index].architectures)
        for architecture, row in enumerate(plan.group_of)
        for depth, index in enumerate(row)
    }


def segments(branches: Sequence[Branch]) -> Iterator[tuple[Segment, list[int]]]:
    for branch in branches:
        for segment in branch.segments:
            yield segment, [int(name[1:]) - 1 for name in branch.versions]
        yield from segments(branch.branches)


def test_a_plan_of_two_versions_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = run_plan(capsys, "max_common", "--versions", "v1", "v4", "--num-clients", "3")
    lines = [line.strip("│├└─ ") for line in text.splitlines()]
    start = lines.index("V1 V4")
    assert lines[start : start + 6] == [
        "V1 V4",
        "layer 1 · conv 4 · averaged over V1 V4 (3 clients)",
        "V1",
        "layers 2-8 · conv 8..32 · averaged over V1 (2 clients)",
        "layers 9-11 · linear 256..10 · averaged over V1 (2 clients)",
        "V4",
    ]
    content = json.loads(run_plan(capsys, "max_common", "--versions", "v1", "v4", "--json"))
    assert [(version["version"], version["model"]) for version in content["versions"]] == [
        ("v1", "vgg11_bn"),
        ("v4", "vgg19_bn"),
    ]
    assert {name for group in content["groups"] for name in group["versions"]} == {"v1", "v4"}


def test_a_layer_is_called_after_what_its_normalisation_normalises() -> None:
    def model(*modules: nn.Module) -> nn.Module:
        layers = nn.Sequential(*modules)
        layers.declared_layers = lambda: [DeclaredLayer(modules)]
        return layers

    cases: list[tuple[tuple[nn.Module, ...], str]] = [
        ((nn.LayerNorm(3), nn.Linear(3, 4)), "layer 1 · linear 4 · "),
        ((nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "layer 1 · conv 4 · "),
        ((nn.LayerNorm(3),), "layer 1 · layernorm · "),
    ]
    for modules, text in cases:
        plan = sharing_plan([model(*modules), model(*modules)], "max_common")
        [(segment, _)] = segments(plan_summary(plan, ["vgg11_bn"] * 2).tree)
        assert segment_text(segment).startswith(text)


def test_tree_names_versions_that_keep_layers_that_others_average() -> None:
    plan, names = thin_plan("clustered_common", 7)
    texts = [segment_text(segment) for segment, _ in segments(plan_summary(plan, names).tree)]
    assert "layers 2-6 · conv 4..16 · averaged within each of V2 V3 (2 clients each); personal in V4" in texts
    assert "layer 7 · conv 16 · averaged over V3 (2 clients); personal in V4" in texts
    plan, names = thin_plan("clustered_fl", 9)
    texts = [segment_text(segment) for segment, _ in segments(plan_summary(plan, names).tree)]
    assert texts[0].endswith(
        "over V1 (3 clients) and over V2 (2 clients) and over V3 (2 clients) and over V4 (2 clients)"
    )


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--family", "resnext", "vgg_plain"),
        ("--scheme", "max", "clustered_common"),
        ("--classifier", "sometimes", "never"),
        ("--num-clients", "few", "few"),
    ],
)
def test_an_unknown_choice_ends_with_status_2_and_the_choices(
    capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    options = {"--family": "vgg", "--scheme": "max_common", option: value}
    with pytest.raises(SystemExit) as ended:
        main(["plan", *(word for pair in options.items() for word in pair)])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-clients", "-2"), ("--num-clients", "0"), ("--num-classes", "-1"), ("--width", "nan"), ("--width", "-1"),
     ("--in-channels", "0"), ("--num-clients", "1000000000000"), ("--num-classes", "4611686018427387904"),
     ("--in-channels", "9999999999999999999")],
)  # fmt: skip
def test_a_number_out_of_range_ends_with_status_2(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert main(["plan", "--family", "vgg", "--scheme", "max_common", option, value]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert option.removeprefix("--").replace("-", "_") in message
    assert "must be" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["report", "--help"]])
def test_help_imports_none_of_the_slow_packages(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from flexifed.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0\n"
        "slow = sorted({'torch', 'ray', 'pandas', 'pyarrow', 'numpy'} & set(sys.modules))\n"
        "assert not slow, slow\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "usage: flexifed" in ended.stdout


# models, shares, data


def test_models_lists_every_version_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for models in FAMILIES.values():
        for name in models:
            num_classes = 4 if input_kind(name) == "text" else 10
            count = sum(
                parameter.numel()
                for parameter in build_model(name, num_classes=num_classes, device="meta").parameters()
            )
            assert any(name in line.split() and f"{count:,}" in line for line in lines)


def test_models_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    assert "…" not in capsys.readouterr().out


def test_the_docs_table_of_shares_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shares"]) == 0
    page = (Path(__file__).parents[1] / "docs" / "shares.md").read_text()
    assert capsys.readouterr().out.strip() in page


def data_blocks(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The lines of each block that `flexifed data` prints, by the block's first words."""
    blocks = [block.splitlines() for block in capsys.readouterr().out.rstrip().split("\n\n")]
    return {lines[0].partition(":")[0]: [line.strip() for line in lines] for lines in blocks}


def test_data_says_how_to_get_missing_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "--data-dir", str(tmp_path)]) == 0
    blocks = data_blocks(capsys)
    assert list(blocks) == ["data folder", *SOURCES]
    assert blocks.pop("data folder") == [f"data folder: {tmp_path}"]
    assert blocks.pop("speech_commands_12")[1:] == ["As for speech_commands."]
    for name, (state, remedy) in blocks.items():
        assert state == f"{name}: absent; runs use a synthetic stand-in"
        assert remedy.startswith("Run with --download (")
        assert str(tmp_path) in remedy


def test_data_says_that_the_folder_does_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "--data-dir", str(tmp_path / "mistyped")]) == 0
    assert data_blocks(capsys)["data folder"] == [f"data folder: {tmp_path / 'mistyped'} (does not exist)"]


def test_damaged_data_do_not_hide_other_data_and_end_with_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "ag_news_csv").mkdir()
    assert main(["data", "--data-dir", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "\ncifar10: can't be used\n  CIFAR-10 in" in captured.out
    assert "\ncinic10: absent" in captured.out
    assert f"\nagnews: can't be used\n  {tmp_path / 'ag_news_csv' / 'train.csv'} is missing" in captured.out
    assert captured.err == "error: cifar10, agnews can't be used; see above\n"


def test_data_without_a_network_says_what_could_not_be_downloaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(download, "urlopen", unreachable)
    assert main(["data", "--data-dir", str(tmp_path / "new"), "--download"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"data folder: {tmp_path / 'new'}\n")
    for name in SOURCES:
        assert f"\n{name}: could not be downloaded\n  " in captured.out
    assert f"error: {', '.join(SOURCES)} could not be downloaded; see above\n" in captured.err


def test_data_says_what_part_of_a_data_set_exists(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEXIFED_CACHE_DIR", raising=False)
    (tmp_path / "ag_news_csv").mkdir()
    for name in ("train", "test"):
        (tmp_path / "ag_news_csv" / f"{name}.csv").write_text('"1","a","b"\n')
    assert main(["data", "--data-dir", str(tmp_path)]) == 0
    *block, remedy = data_blocks(capsys)["agnews"]
    assert block == [
        "agnews: partial; results say real-partial",
        "1 training and 1 test samples of 4 classes (csv version).",
        "There: train.csv holds 1 of 120,000 texts; test.csv holds 1 of 7,600 texts.",
    ]
    assert remedy.startswith("Run with --download (31.3 MB), or put ")


def test_data_describes_real_data(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    assert main(["data", "--data-dir", str(data_dir)]) == 0
    assert data_blocks(capsys)["cifar10"][0] == "cifar10: whole"


# report


def store(
    results: Path,
    scheme: str,
    *,
    profile: str = "quick",
    seed: int = 0,
    rounds: int = 4,
    played: int | None = None,
    source: str = "synthetic",
    fingerprint: str = "data-1",
    accuracy: float = 0.5,
    unknown_settings: Sequence[str] = (),
    **settings: Any,
) -> None:
    """A cell's file. Accuracy rises by 0.01 a round, and by 0.001 a version.

    The numeric settings in `unknown_settings` are left out, as in a file written before they existed.
    """
    named = PROFILES[profile]
    defaults = {"model": named.model, "partition": named.partition, "training": named.training}
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme=scheme,
        seed=seed,
        **{**defaults, **settings},  # type: ignore[arg-type]
    )
    run_id = config.run_id(fingerprint)
    stored = asdict(config)
    for name in unknown_settings:
        del stored["numerics"][name]
    writer = RoundsWriter(
        ResultsFolder(results / "table1").rounds_file(f"cifar10-vgg-{scheme}-seed{seed}-{run_id}-{rounds}"),
        {"rounds": rounds, "profile": profile, "config": stored, "data": {"fingerprint": fingerprint}},
    )
    for round_index in range(rounds + 1 if played is None else played):
        writer.append(
            [
                {
                    "run_id": run_id, "dataset": "cifar10", "data_source": source, "family": "vgg", "scheme": scheme,
                    "seed": seed, "profile": profile, "round": round_index, "client": client,
                    "version": config.version(client), "model": config.model_name(client),
                    "accuracy": accuracy + 0.01 * round_index + 0.001 * (client % 4), "loss": 1.0, "num_train": 10,
                    "num_test": 10, "bytes_up": 0, "bytes_down": 0, "eval_s": 0.1, "round_s": 0.1, "device": "cpu",
                    "actor": 0,
                }
                for client in range(8)
            ]
        )  # fmt: skip
    writer.flush()


def run_report(capsys: pytest.CaptureFixture[str], results: Path, *options: str) -> str:
    assert main(["report", str(results), *options]) == 0
    return capsys.readouterr().out


def row(text: str, scheme: str) -> list[str]:
    """The numbers of a scheme in the first table."""
    return next(line for line in text.splitlines() if line.startswith(f"{scheme} ")).split()[1:]


def test_report_prints_the_table_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store(tmp_path, "standalone", accuracy=0.5)
    store(tmp_path, "max_common", accuracy=0.6)
    text = run_report(capsys, tmp_path)
    assert "profile quick, 4 rounds, synthetic data, cpu\n" in text
    assert row(text, "standalone") == ["54.0", "54.1", "54.2", "54.3"]
    assert row(text, "max_common") == ["64.0", "64.1", "64.2", "64.3"]
    assert "SYNTHETIC DATA" in text
    assert "Unfinished" not in text


def test_report_picks_rounds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store(tmp_path, "standalone", rounds=20)
    assert row(run_report(capsys, tmp_path, "--pick", "last"), "standalone")[0] == "69.5"
    assert row(run_report(capsys, tmp_path, "--pick", "final"), "standalone")[0] == "70.0"
    assert row(run_report(capsys, tmp_path, "--pick", "best"), "standalone")[0] == "70.0"
    both = run_report(capsys, tmp_path, "--pick", "final", "--pick", "last", "--format", "csv").splitlines()
    assert [tuple(line.split(",")[4:12]) for line in both if ",v1," in line] == [
        (pick, "cifar10", "vgg", "standalone", "v1", "synthetic", "1", mean)
        for pick, mean in [("final", "70.0"), ("last", "69.5")]
    ]


@pytest.mark.parametrize("part", ["rounds", "runs"])
def test_report_of_a_part_of_an_experiments_folder_names_the_whole(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, part: str
) -> None:
    store(tmp_path, "standalone")
    (tmp_path / "table1" / "runs").mkdir(exist_ok=True)
    assert main(["report", str(tmp_path / "table1" / part)]) == 2
    folder = tmp_path / "table1"
    assert f"{folder / part} is a part of an experiment's folder; give the whole folder, {folder}" in (
        capsys.readouterr().err
    )


def test_report_names_unfinished_cells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store(tmp_path, "standalone")
    store(tmp_path, "max_common", played=3)
    text = run_report(capsys, tmp_path)
    assert "cifar10/vgg/max_common seed 0: round 2 of 4" in text
    assert not any(line.startswith("max_common ") for line in text.splitlines())


def test_report_of_unfinished_cells_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store(tmp_path, "max_common", played=1)
    text = run_report(capsys, tmp_path)
    assert "No cell is finished." in text
    assert "round 0 of 4" in text


def test_report_never_mixes_runs_that_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store(tmp_path, "standalone", accuracy=0.10)
    store(tmp_path, "standalone", accuracy=0.20, rounds=5)
    store(tmp_path, "standalone", accuracy=0.30, profile="smoke")
    store(tmp_path, "standalone", accuracy=0.40, source="real", fingerprint="data-2")
    store(tmp_path, "standalone", accuracy=0.50, training=replace(PROFILES["quick"].training, learning_rate=0.1))
    store(tmp_path, "standalone", accuracy=0.60, fingerprint="data-3")
    text = run_report(capsys, tmp_path)
    tables = [part.splitlines() for part in text.split("profile ")[1:]]
    assert {lines[0]: row("\n".join(lines), "standalone")[0].split()[0] for lines in tables} == {
        "quick, 4 rounds, synthetic data (data-1), cpu": "14.0",
        "quick, 5 rounds, synthetic data, cpu": "25.0",
        "smoke, 4 rounds, synthetic data, cpu": "34.0",
        "quick, 4 rounds, real data, cpu": "44.0",
        "quick, 4 rounds, synthetic data, cpu; not the profile's: training.learning_rate=0.1": "54.0",
        "quick, 4 rounds, synthetic data (data-3), cpu": "64.0",
    }


def test_report_separates_runs_with_different_convolution_algorithms(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    direct, bf16 = NumericsConfig(winograd=False), NumericsConfig(precision="bf16")
    store(tmp_path, "standalone", accuracy=0.10)
    store(tmp_path, "standalone", accuracy=0.20, numerics=direct, unknown_settings=["winograd"])
    store(tmp_path, "max_common", accuracy=0.30, numerics=direct)
    store(tmp_path, "standalone", accuracy=0.40, numerics=bf16)
    store(tmp_path, "max_common", accuracy=0.50, numerics=replace(bf16, winograd=False))
    text = run_report(capsys, tmp_path)
    tables = {part.splitlines()[0].split("cpu")[1]: part for part in text.split("profile ")[1:]}
    schemes = {
        title: [row(table, scheme)[0].split()[0] for scheme in ("standalone", "max_common") if f"\n{scheme} " in table]
        for title, table in tables.items()
    }
    assert schemes == {
        "": ["14.0"],
        "; not the profile's: numerics.winograd=False": ["24.0", "34.0"],
        "; not the profile's: numerics.precision=bf16": ["44.0", "54.0"],
    }
    assert len({study.slug for study in load_results(tmp_path)}) == 3


def test_report_of_one_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store(tmp_path, "standalone")
    store(tmp_path, "standalone", profile="smoke")
    text = run_report(capsys, tmp_path, "--profile", "smoke")
    assert "profile smoke" in text
    assert "profile quick" not in text
    assert main(["report", str(tmp_path), "--profile", "thin"]) == 2
    assert "choose one of: quick, smoke" in capsys.readouterr().err


def test_report_over_seeds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed in (0, 1):
        store(tmp_path, "standalone", seed=seed, accuracy=0.5 + 0.02 * seed)
    store(tmp_path, "clustered_fl", seed=1, accuracy=0.6)
    text = run_report(capsys, tmp_path)
    assert row(text, "standalone")[0] == "55.0±1.4"
    assert row(text, "clustered_fl")[0] == "64.0"
    assert "Fewer seeds: cifar10/vgg/clustered_fl 1 of 2." in text
    assert "+8.0" in text


def test_no_results_say_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in message
    assert "experiments/table1.py --results-dir" in message
    store(tmp_path, "standalone")
    assert main(["report", str(tmp_path), "--experiment", "figure9"]) == 2
    message = capsys.readouterr().err
    assert "has results of: table1 (choose with --experiment, in Python with experiment=)" in message
    assert ".py" not in message, "no such script exists"
    assert main(["report", str(tmp_path / "empty"), "--experiment", "table1-2"]) == 2
    assert "experiments/table1.py --results-dir" in capsys.readouterr().err


def test_damaged_results_end_with_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rounds = ResultsFolder(tmp_path / "table1").rounds
    rounds.mkdir(parents=True)
    (rounds / "cell.parquet").write_bytes(b"no parquet")
    assert main(["report", str(tmp_path)]) == 2
    assert "can't read" in capsys.readouterr().err


def test_data_of_selected_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--data-dir", str(tmp_path), "--only", "agnews", "cinic10"]) == 0
    output = capsys.readouterr().out
    assert [
        line.split(":")[0] for line in output.splitlines() if line.endswith(": absent; runs use a synthetic stand-in")
    ] == [
        "cinic10",
        "agnews",
    ]
    assert "cifar10:" not in output


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "flexifed", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "{plan,shares,models,data,report,export}" in output


def test_a_pipe_that_its_reader_closes_is_no_error(tmp_path: Path) -> None:
    """As in `flexifed report --format markdown | head -n 1`."""
    store(tmp_path, "max_common")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flexifed", "report", str(tmp_path), "--format", "markdown"]
    with os.fdopen(writing, "w") as pipe:
        finished = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (141, "")
