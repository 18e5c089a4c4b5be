"""Checkpoints of one cell: what the rest of a run depends on. A kill loses the rounds since the last one, no more.

    <folder>/round-000012/clients-000000.safetensors    what the clients of one process keep to themselves
    <folder>/round-000012/shared.safetensors            the driver's part of the global state
    <folder>/round-000012/shared-000000.safetensors     the groups whose clients all live in one process
    <folder>/round-000012/manifest.json                 written last: checksums of the others and its own; it commits

A file is written beside its place, flushed and renamed. A folder without a manifest is one that was never finished; one
whose files don't match it is damaged. Both are passed over, and the one before is used. Nothing here is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flexifed.core.aggregate import GroupState
from flexifed.core.schemes import Group
from flexifed.errors import ResultsError
from flexifed.files import atomic_write, writing

KEPT = 2
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
_GROUPS = "shared"  # what the names of all files with groups begin with
_DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        next_round: the round that a run goes on with.
        folder: where its files are.
        files: their names, with the SHA-256 of each.
    """

    next_round: int
    folder: Path
    files: Mapping[str, str]


class Checkpoints:
    """The checkpoints of one cell.

    Args:
        root: their folder.
        run_id: a checkpoint of another run is never used.
        at_most: the last round that the run may go on with. Later checkpoints are of a longer run, and left alone.
    """

    def __init__(self, root: Path, run_id: str, at_most: int | None = None) -> None:
        self._root = root
        self._run_id = run_id
        self._at_most = at_most
        self._good: list[Path] = []  # newest first

    def begin(self, next_round: int) -> Path:
        """An empty folder for the files of a checkpoint.

        Raises:
            ResultsError: it can't be made.
        """
        folder = self._folder(next_round)
        with writing(folder):
            _remove(folder)
            folder.mkdir(parents=True)
        return folder

    def commit(self, next_round: int, files: Mapping[str, str]) -> None:
        """Make a checkpoint valid, and delete all but it and the one before that was good.

        Args:
            next_round: the round that a run goes on with.
            files: name and SHA-256 of each file in the folder that `begin` made.

        Raises:
            ResultsError: the manifest can't be written.
        """
        folder = self._folder(next_round)
        content = {"run_id": self._run_id, "next_round": next_round, "files": dict(files)}
        manifest = {"sha256": _digest(content), "content": content}
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        self._good = [folder, *(good for good in self._good if good != folder)][:KEPT]
        self._delete_others()

    def latest(
        self, note: Callable[[str], None], fits: Callable[[Checkpoint], bool] = lambda one: True
    ) -> Checkpoint | None:
        """The last checkpoint that is whole, or None.

        Args:
            note: told of each one that is passed over, and why.
            fits: whether the rest of the run's results go with it.
        """
        for folder in self._folders():
            try:
                checkpoint = self._verified(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                note(f"checkpoint {folder.name} is passed over: {error}")
                continue
            if fits(checkpoint):
                self._good = [folder]
                return checkpoint
            note(f"checkpoint {folder.name} is passed over: the rows before it are not all there")
        return None

    def newest_round(self) -> int:
        """The round that the newest checkpoint goes on with, 0 without one. Its files are not looked at."""
        return next((_round_of(folder) for folder in self._folders() if (folder / MANIFEST).exists()), 0)

    def end(self, *, keep_final: bool) -> None:
        """The cell has ended: remove all checkpoints, or all but the last, from which more rounds can go on."""
        if keep_final:
            self._good = self._good[:1]
            self._delete_others()
        else:
            shutil.rmtree(self._root, ignore_errors=True)

    def _folder(self, next_round: int) -> Path:
        return self._root / f"round-{next_round:06d}"

    def _folders(self) -> list[Path]:
        """Newest first, up to the run's last round."""
        folders = [path for path in self._root.glob("round-*") if _DIGITS.fullmatch(path.name.removeprefix("round-"))]
        in_order = sorted(folders, key=_round_of, reverse=True)  # by number: from a million rounds on, names get longer
        return [folder for folder in in_order if self._at_most is None or _round_of(folder) <= self._at_most]

    def _delete_others(self) -> None:
        """Delete what is not known to be good: the older ones, and those that a kill or damage has left."""
        for folder in self._folders():
            if folder not in self._good:
                with suppress(OSError):
                    _remove(folder)

    def _verified(self, folder: Path) -> Checkpoint:
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError("it was not finished")
        manifest = json.loads(path.read_bytes())
        content = manifest["content"]
        if manifest["sha256"] != _digest(content):
            raise ValueError(f"{MANIFEST} is damaged")
        if content["run_id"] != self._run_id:
            raise ValueError(f"it is of run {content['run_id']}")
        if folder != self._folder(content["next_round"]):
            raise ValueError(f"its manifest says round {content['next_round']}")
        for name, expected in content["files"].items():
            if Path(name).name != name or not (folder / name).is_file():  # no device, no pipe, nothing elsewhere
                raise ValueError(f"{name!r} is no file in it")
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise ValueError(f"{name} is damaged (SHA-256 {found[:8]}..., expected {expected[:8]}...)")
        return Checkpoint(content["next_round"], folder, content["files"])


def _round_of(folder: Path) -> int:
    """The round in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("round-"))


def _digest(content: object) -> str:
    """SHA-256 of what JSON holds, however it is written: a key that hides another is a change too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Delete a folder, or whatever stands in its place, if there is anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors, from whatever device, as safetensors; returns the file's SHA-256.

    Raises:
        ResultsError: the file can't be written.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with atomic_write(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names are wanted, on the CPU.

    Raises:
        ResultsError: the file can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, SafetensorError) as error:
        raise ResultsError(f"can't read {path}: {error}; remove its folder, and the one before is used") from error


def write_groups(path: Path, state: GroupState) -> str:
    """Write the values of groups; see `write_tensors`."""
    return write_tensors(
        path, {f"{group}/{index}": tensor for group, tensors in state.items() for index, tensor in enumerate(tensors)}
    )


def read_groups(checkpoint: Checkpoint, groups: Iterable[Group]) -> GroupState:
    """The values of some groups, whichever process wrote them, on the CPU.

    Raises:
        ResultsError: the checkpoint does not have them, or a file can't be read.
    """
    names = {group.index: [f"{group.index}/{index}" for index in range(len(group.tensors))] for group in groups}
    wanted = {name for ordered in names.values() for name in ordered}
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        if file.startswith(_GROUPS):
            found |= read_tensors(checkpoint.folder / file, wanted.__contains__)
    if missing := wanted - found.keys():
        raise ResultsError(
            f"{checkpoint.folder} does not hold the tensors of this cell ({len(missing)} are missing); remove it, and "
            "the one before is used"
        )
    return {index: tuple(found[name] for name in ordered) for index, ordered in names.items()}
