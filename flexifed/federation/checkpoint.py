"""Checkpoints of one cell: what the rest of a run depends on. A kill loses the rounds since the last one, no more.

    <folder>/round-000012/clients-000000.safetensors    what the clients of one process keep to themselves
    <folder>/round-000012/shared.safetensors            the driver's global state
    <folder>/round-000012/manifest.json                 written last: the checksums of the others; it commits the round

A file is written beside its place, flushed and renamed. A folder without a manifest is one that was never finished; one
whose files don't match it is damaged. Both are passed over, and the one before is used. Nothing here is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flexifed.errors import ResultsError

KEPT = 2
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"


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
    """

    def __init__(self, root: Path, run_id: str) -> None:
        self._root = root
        self._run_id = run_id

    def begin(self, next_round: int) -> Path:
        """An empty folder for the files of a checkpoint.

        Raises:
            ResultsError: it can't be made.
        """
        folder = self._root / f"round-{next_round:06d}"
        with _explained(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        return folder

    def commit(self, next_round: int, files: Mapping[str, str]) -> None:
        """Make a checkpoint valid, and delete all but the last two.

        Args:
            next_round: the round that a run goes on with.
            files: name and SHA-256 of each file in the folder that `begin` made.

        Raises:
            ResultsError: the manifest can't be written.
        """
        folder = self._root / f"round-{next_round:06d}"
        manifest = {"run_id": self._run_id, "next_round": next_round, "files": dict(files)}
        write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        for old in self._folders()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, note: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
        """The last checkpoint that is whole, or None.

        Args:
            note: told of each one that is passed over, and why.
            at_most: the latest round that a run may go on with.
        """
        for folder in self._folders():
            try:
                checkpoint = self._verified(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                note(f"checkpoint {folder.name} is passed over: {error}")
                continue
            if at_most is None or checkpoint.next_round <= at_most:
                return checkpoint
        return None

    def end(self, *, keep_final: bool) -> None:
        """The cell has ended: remove all checkpoints, or all but the last, from which more rounds can go on."""
        if not keep_final:
            shutil.rmtree(self._root, ignore_errors=True)
        for old in self._folders()[1:]:
            shutil.rmtree(old, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Newest first."""
        return sorted(self._root.glob("round-*"), reverse=True) if self._root.exists() else []

    def _verified(self, folder: Path) -> Checkpoint:
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError("it was not finished")
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest["next_round"], int):
            raise ValueError(f"its manifest says round {manifest['next_round']!r}")
        if manifest["run_id"] != self._run_id:
            raise ValueError(f"it is of run {manifest['run_id']}")
        if folder.name != f"round-{manifest['next_round']:06d}":
            raise ValueError(f"its manifest says round {manifest['next_round']}")
        for name, expected in manifest["files"].items():
            if Path(name).name != name or not (folder / name).is_file():  # no device, no pipe, nothing elsewhere
                raise ValueError(f"{name!r} is no file in it")
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise ValueError(f"{name} is damaged (SHA-256 {found[:8]}..., expected {expected[:8]}...)")
        return Checkpoint(manifest["next_round"], folder, manifest["files"])


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors, from whatever device, as safetensors; returns the file's SHA-256.

    Raises:
        ResultsError: the file can't be written.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_file(path, content)
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


def write_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it, and rename it.

    Raises:
        ResultsError: it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _explained(path):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError into an error that says which file, and what to do."""
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"can't write {path}: {error.strerror or error}; make room or mend the folder, "
            "then the same command goes on"
        ) from error
