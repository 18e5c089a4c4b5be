"""`--fresh` starts over in a new folder; every other command continues in the newest one."""

from __future__ import annotations

from pathlib import Path

from flexifed.results.attempts import experiment_folders, fresh_folder, newest_folder


def used(results: Path, name: str) -> Path:
    """Create the folder of an experiment that has one cell."""
    (results / name / "runs" / "a cell").mkdir(parents=True)
    return results / name


def test_the_first_folder_has_the_plain_name(tmp_path: Path) -> None:
    assert newest_folder(tmp_path, "table1") == fresh_folder(tmp_path, "table1") == tmp_path / "table1"
    assert experiment_folders(tmp_path, "table1") == []
    assert list(tmp_path.iterdir()) == []


def test_each_fresh_start_has_its_own_folder_and_the_newest_is_used(tmp_path: Path) -> None:
    folders = []
    for expected in ("table1", "table1-2", "table1-3"):
        fresh = fresh_folder(tmp_path, "table1")
        assert fresh.name == expected
        folders.append(used(tmp_path, fresh.name))
        assert newest_folder(tmp_path, "table1") == fresh
        assert experiment_folders(tmp_path, "table1") == folders


def test_a_folder_without_any_cell_counts_as_fresh(tmp_path: Path) -> None:
    used(tmp_path, "table1")
    for part in ("rounds", "runs"):
        (tmp_path / "table1-2" / part).mkdir(parents=True)
    assert fresh_folder(tmp_path, "table1") == tmp_path / "table1-2"


def test_folders_are_sorted_by_number_and_other_names_are_ignored(tmp_path: Path) -> None:
    for name in ("table1", "table1-9", "table1-10", "table1-old", "table1-02", "table10", "table1-2-3", "my-table1-99"):
        used(tmp_path, name)
    (tmp_path / "table1-11").touch()
    assert [folder.name for folder in experiment_folders(tmp_path, "table1")] == ["table1", "table1-9", "table1-10"]
    assert newest_folder(tmp_path, "table1").name == "table1-10"


def test_a_first_folder_that_was_moved_away_is_not_created_again(tmp_path: Path) -> None:
    used(tmp_path, "table1-2")
    assert newest_folder(tmp_path, "table1").name == "table1-2"
    assert fresh_folder(tmp_path, "table1").name == "table1-3"
