"""Checkpoints of one cell: everything that later rounds depend on. A kill loses only the rounds since the last one.

    <folder>/round-000012/clients-000000.safetensors    the tensors that the clients of one process keep
    <folder>/round-000012/shared.safetensors            the driver's part of the global state
    <folder>/round-000012/shared-000000.safetensors     the groups whose clients all live in one process
    <folder>/round-000012/manifest.json                 checksums of the other files and of itself; commits the others

Each file is written under another name, flushed and renamed; the manifest is written last. A checkpoint without a
manifest is unfinished; one whose files don't match its manifest is damaged. Both are skipped, and an earlier checkpoint
is used. Nothing here is unpickled.
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

from flexifed.core.aggregate import GroupState, State
from flexifed.core.schemes import Group
from flexifed.errors import ResultsError
from flexifed.files import atomic_write, writing

KEPT = 2  # valid checkpoints of a cell that is running
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
CLIENTS = "clients-"  # prefix of the names of all files with tensors that clients keep
_GROUPS = "shared"  # prefix of the names of all files with groups
_DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        next_round: the round with which a run resumes.
        folder: the folder of its files.
        files: the SHA-256 of each file, by name.
    """

    next_round: int
    folder: Path
    files: Mapping[str, str]


class Checkpoints:
    """The checkpoints of one cell.

    Args:
        root: the folder of the cell's checkpoints.
        run_id: the run; checkpoints of another run are never used.
        at_most: the last round with which the run may resume. Later checkpoints belong to a longer run and are left
            alone.
    """

    def __init__(self, root: Path, run_id: str, at_most: int | None = None) -> None:
        self._root = root
        self._run_id = run_id
        self._at_most = at_most
        self._valid: list[Path] = []  # newest first

    def begin(self, next_round: int) -> Path:
        """Make an empty folder for the files of a checkpoint.

        Raises:
            ResultsError: the folder can't be made.
        """
        folder = self._folder(next_round)
        with writing(folder):
            _remove(folder)
            folder.mkdir(parents=True)
        return folder

    def commit(self, next_round: int, files: Mapping[str, str]) -> None:
        """Make a checkpoint valid, and delete all others except the last valid one before it.

        Args:
            next_round: the round with which a run resumes.
            files: the SHA-256 of each file in the folder that `begin` made, by name.

        Raises:
            ResultsError: the manifest can't be written.
        """
        folder = self._folder(next_round)
        content = {"run_id": self._run_id, "next_round": next_round, "files": dict(files)}
        manifest = {"sha256": _digest(content), "content": content}
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        self._valid = [folder, *(valid for valid in self._valid if valid != folder)][:KEPT]
        self._delete_others()

    def latest(
        self,
        note: Callable[[str], None],
        fits: Callable[[Checkpoint], bool] = lambda checkpoint: True,
        *,
        may_be_writing: bool = False,
    ) -> Checkpoint | None:
        """Find the newest checkpoint that is complete and undamaged, or None.

        Args:
            note: called with a message for each checkpoint that is skipped.
            fits: whether the rows of the rounds before a checkpoint are complete.
            may_be_writing: skip unfinished checkpoints without a message, because the run may be writing one.
        """
        for folder in self._folders():
            if may_be_writing and not (folder / MANIFEST).exists():
                continue
            try:
                checkpoint = self._verified(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                note(f"checkpoint {folder.name} is skipped: {error}")
                continue
            if fits(checkpoint):
                self._valid = [folder]
                return checkpoint
            note(f"checkpoint {folder.name} is skipped: rows of the rounds before it are missing")
        return None

    def newest_round(self) -> int:
        """The round with which a run resumes from the newest checkpoint, or 0. Its files are not verified."""
        return next((_round_of(folder) for folder in self._folders() if (folder / MANIFEST).exists()), 0)

    def end(self, *, keep_final: bool) -> None:
        """Remove all checkpoints of a cell that has ended, or all but the last, from which a longer run can resume."""
        if keep_final:
            self._valid = self._valid[:1]
            self._delete_others()
        else:
            shutil.rmtree(self._root, ignore_errors=True)

    def _folder(self, next_round: int) -> Path:
        return self._root / f"round-{next_round:06d}"

    def _folders(self) -> list[Path]:
        """The folders of all checkpoints up to the run's last round, newest first."""
        folders = [path for path in self._root.glob("round-*") if _DIGITS.fullmatch(path.name.removeprefix("round-"))]
        newest_first = sorted(folders, key=_round_of, reverse=True)  # not by name: numbers may exceed six digits
        return [folder for folder in newest_first if self._at_most is None or _round_of(folder) <= self._at_most]

    def _delete_others(self) -> None:
        """Delete all checkpoints that are not known to be valid: older, unfinished and damaged ones."""
        for folder in self._folders():
            if folder not in self._valid:
                with suppress(OSError):
                    _remove(folder)

    def _verified(self, folder: Path) -> Checkpoint:
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError("it is unfinished")
        manifest = json.loads(path.read_bytes())
        content = manifest["content"]
        if manifest["sha256"] != _digest(content):
            raise ValueError(f"{MANIFEST} is damaged")
        if content["run_id"] != self._run_id:
            raise ValueError(f"it belongs to run {content['run_id']}")
        if folder != self._folder(content["next_round"]):
            raise ValueError(f"its manifest says round {content['next_round']}")
        for name, expected in content["files"].items():
            if Path(name).name != name or not (folder / name).is_file():  # excludes devices, pipes and other folders
                raise ValueError(f"{name!r} is not a file in it")
            with open(folder / name, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected:
                raise ValueError(f"{name} is damaged (SHA-256 {actual[:8]}..., expected {expected[:8]}...)")
        return Checkpoint(content["next_round"], folder, content["files"])


def _round_of(folder: Path) -> int:
    """The round in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("round-"))


def _digest(content: object) -> str:
    """SHA-256 of a parsed JSON value: formatting does not count, but a duplicate key that replaces a value does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Delete a folder, or a file in its place, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors from any device in the safetensors format; returns the file's SHA-256.

    Raises:
        ResultsError: the file can't be written.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with atomic_write(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Read the tensors of a file for whose names `wanted` is true, onto the CPU.

    Raises:
        ResultsError: the file can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, SafetensorError) as error:
        raise ResultsError(
            f"can't read {path}: {error}; remove its folder to resume from an earlier checkpoint"
        ) from error


def write_clients(path: Path, kept: Mapping[int, State]) -> str:
    """Write the tensors that clients keep; see `write_tensors`."""
    return write_tensors(
        path, {f"{client}/{name}": tensor for client, state in kept.items() for name, tensor in state.items()}
    )


def read_clients(checkpoint: Checkpoint, clients: Iterable[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Read the tensors that clients keep, from the files of all processes, onto the CPU.

    Raises:
        ResultsError: a file can't be read.
    """
    kept: dict[int, dict[str, torch.Tensor]] = {client: {} for client in clients}
    for file in checkpoint.files:
        if file.startswith(CLIENTS):
            tensors = read_tensors(checkpoint.folder / file, lambda key: int(key.split("/")[0]) in kept)
            for key, tensor in tensors.items():
                client, name = key.split("/", 1)
                kept[int(client)][name] = tensor
    return kept


def write_groups(path: Path, state: GroupState) -> str:
    """Write the tensors of groups; see `write_tensors`."""
    return write_tensors(
        path, {f"{group}/{index}": tensor for group, tensors in state.items() for index, tensor in enumerate(tensors)}
    )


def read_groups(checkpoint: Checkpoint, groups: Iterable[Group]) -> GroupState:
    """Read the tensors of groups, from the files of all processes, onto the CPU.

    Raises:
        ResultsError: the checkpoint lacks some of the tensors, or a file can't be read.
    """
    names = {group.index: [f"{group.index}/{index}" for index in range(len(group.tensors))] for group in groups}
    wanted = {name for ordered in names.values() for name in ordered}
    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        if file.startswith(_GROUPS):
            tensors |= read_tensors(checkpoint.folder / file, wanted.__contains__)
    if missing := wanted - tensors.keys():
        raise ResultsError(
            f"{checkpoint.folder} does not hold all tensors of this cell ({len(missing)} are missing); remove it to "
            "resume from an earlier checkpoint"
        )
    return {index: tuple(tensors[name] for name in ordered) for index, ordered in names.items()}


def state_sha256(state: State) -> str:
    """SHA-256 over names, types, shapes and bytes of a state, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
