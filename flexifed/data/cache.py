"""Cache of decoded arrays: built once, then mapped into memory by all processes of a machine.

    <folder>/lock                                held by the process that builds
    <folder>/building-<random>/                  an unfinished build
    <folder>/<name>-<digest>/train_samples.npy   NumPy's own format, one file for each array
    <folder>/<name>-<digest>/manifest.json       sizes and checksums of the other files; written last

The digest covers the source and the version of the decoding code: if either changes, the arrays are built in a new
folder, and the old one is deleted. A build is written to a temporary folder, flushed and renamed, so that another
process sees either all of it or nothing. The kernel releases the lock when the process that holds it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import tokenize
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexifed.data.dataset import data_changed
from flexifed.data.locks import locked
from flexifed.errors import DataError
from flexifed.files import flush_to_disk

FOLDER = ".flexifed-cache"
"""Subfolder of a data folder that holds the caches of its data sets, `<data_dir>/.flexifed-cache/<name>`."""
MANIFEST = "manifest.json"
HASH_BYTES = 1 << 24

Build = Callable[[Path], Mapping[str, object]]


@dataclass(frozen=True, eq=False)
class CachedArrays:
    """Read-only arrays mapped from files. They stay readable if their files are deleted.

    Attributes:
        facts: the facts that the build returned.
        fingerprint: SHA-256 of the names, types, shapes and bytes of all arrays, in hexadecimal.
    """

    facts: Mapping[str, Any]
    fingerprint: str
    _arrays: Mapping[str, NDArray[Any]]

    def array(self, name: str) -> NDArray[Any]:
        """Return one array.

        Raises:
            KeyError: the build wrote no such array.
        """
        return self._arrays[name]


def cached_arrays(data_dir: Path, *, name: str, version: int, source_key: str, build: Build) -> CachedArrays:
    """Open the arrays decoded from a source; build them first if they are not in the cache.

    Any number of processes may call this at the same time: one builds, the others wait for it. Opening checks sizes and
    times; contents are read only if a file's time has changed.

    Args:
        data_dir: the data folder. The cache is a subfolder of it, unless $FLEXIFED_CACHE_DIR names another folder. If
            that subfolder can't be written, it is still read; new arrays then go to `flexifed` in $XDG_CACHE_HOME, or
            in ~/.cache.
        name: name of the arrays and of their cache folder.
        version: version of the decoding code. Increase it when the same source would give different arrays or facts.
        source_key: digest of the source, from `source_key`.
        build: writes at least one `.npy` file into the empty folder passed to it (`np.lib.format.open_memmap` writes
            arrays that don't fit into memory), and returns facts that JSON can hold.

    Raises:
        DataError: no folder can be written, or there is no space. Errors of `build` are passed on.
    """
    key = f"{name}-{hashlib.sha256(f'{version}/{source_key}'.encode()).hexdigest()[:16]}"
    cache_folders = _cache_folders(data_dir, name)
    for cache_folder in cache_folders:
        if (opened := _open(cache_folder / key)) is not None:
            return opened
    cache_folder = _writable_folder(cache_folders, name)
    with locked(cache_folder / "lock", f"{name}: waiting for another process that decodes it into {cache_folder}"):
        if (opened := _open(cache_folder / key)) is None:
            opened = _build(cache_folder, key, name, build)
            for old in cache_folder.glob(f"{name}-{'?' * 16}"):
                if old.name != key:
                    shutil.rmtree(old, ignore_errors=True)
    return opened


def reopen(data_dir: Path, *, name: str, fingerprint: str, make: Callable[[], CachedArrays]) -> CachedArrays:
    """Open arrays with a known fingerprint, without reading their source.

    Args:
        data_dir: as for `cached_arrays`.
        name: as for `cached_arrays`.
        fingerprint: fingerprint of the arrays.
        make: calls `cached_arrays`, on a machine that has not decoded them yet.

    Raises:
        DataError: `make` returned different arrays. Errors of `make` are passed on.
    """
    for cache_folder in _cache_folders(data_dir, name):
        for manifest in sorted(cache_folder.glob(f"{name}-{'?' * 16}/{MANIFEST}")):
            if (opened := _open(manifest.parent)) is not None and opened.fingerprint == fingerprint:
                return opened
    made = make()
    if made.fingerprint != fingerprint:
        raise data_changed(data_dir, f"its {name} holds different samples now (SHA-256 {made.fingerprint[:16]}...)")
    return made


def source_key(root: Path, files: Iterable[os.DirEntry[str] | Path]) -> str:
    """Return a quick digest of files: their relative paths, sizes and modification times; contents are not read.

    Args:
        root: folder that the paths are relative to.
        files: files below `root`, in a fixed order. The entries of `os.scandir` are the fastest.

    Raises:
        OSError: a file is missing.
    """
    head = len(os.fspath(root))
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        line = f"{os.fspath(file)[head:]}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _open(folder: Path) -> CachedArrays | None:
    """Open a finished build; None if it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        content = manifest["content"]
        if manifest["checksum"] != _checksum(content):
            return None
        arrays = {}
        for name, expected in content["arrays"].items():
            path = folder / f"{name}.npy"
            stat = path.stat()
            if stat.st_size != expected["bytes"]:
                return None
            arrays[name] = np.lib.format.open_memmap(path, mode="r")
            if stat.st_mtime_ns != expected["mtime_ns"] and _digest(arrays[name]) != expected["sha256"]:
                return None
        return CachedArrays(MappingProxyType(content["facts"]), content["fingerprint"], MappingProxyType(arrays))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, tokenize.TokenError):  # the last is NumPy's
        return None


def _build(cache_folder: Path, key: str, name: str, build: Build) -> CachedArrays:
    """Build the arrays in a temporary folder and rename it."""
    with _writing(cache_folder, name):
        for unfinished in cache_folder.glob("building-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        folder = cache_folder / f"building-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            facts = build(folder)
            _commit(folder, facts)
            shutil.rmtree(cache_folder / key, ignore_errors=True)  # a damaged build
            folder.rename(cache_folder / key)
            flush_to_disk(cache_folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if (opened := _open(cache_folder / key)) is None:
        raise DataError(f"{name}: {cache_folder / key} changed while it was built; is another program writing there?")
    return opened


def _commit(folder: Path, facts: Mapping[str, object]) -> None:
    """Flush the arrays of a build, and write its manifest."""
    arrays: dict[str, dict[str, object]] = {}
    for path in sorted(folder.glob("*.npy")):
        flush_to_disk(path)
        stat = path.stat()
        digest = _digest(np.load(path, mmap_mode="r"))
        arrays[path.stem] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    digests = [[name, array["sha256"]] for name, array in arrays.items()]
    content = {"arrays": arrays, "facts": dict(facts), "fingerprint": _checksum(digests)}
    (folder / MANIFEST).write_text(json.dumps({"checksum": _checksum(content), "content": content}, indent=1))
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def _digest(array: NDArray[Any]) -> str:
    """SHA-256 of the type, shape and bytes of a contiguous array."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    content = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(content), HASH_BYTES):
        digest.update(content[start : start + HASH_BYTES])
    return digest.hexdigest()


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cache_folders(data_dir: Path, name: str) -> tuple[Path, ...]:
    """Folders that may hold the arrays, the preferred one first.

    Outside of `data_dir`, the arrays of each data folder and name have a subfolder of their own.
    """
    folder = data_dir / FOLDER / name
    own = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    if named := os.environ.get("FLEXIFED_CACHE_DIR"):
        return (Path(named).expanduser() / own, folder)
    return (folder, Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexifed" / own)


def _writable_folder(cache_folders: Sequence[Path], name: str) -> Path:
    """The first folder that can be created and written.

    Raises:
        DataError: none can.
    """
    problems = []
    for cache_folder in cache_folders:
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
            with open(cache_folder / "lock", "a"), TemporaryFile(dir=cache_folder):
                pass
        except OSError as error:
            problems.append(f"{cache_folder} can't be written ({error.strerror})")
            continue
        if problems:
            print(f"{name}: {problems[0]}, so decoded arrays go to {cache_folder}", file=sys.stderr, flush=True)
        return cache_folder
    raise DataError(
        f"{name}: no folder for decoded arrays on {socket.gethostname()}: {'; '.join(problems)}. "
        "Make one of them writable, or name another in FLEXIFED_CACHE_DIR."
    )


@contextmanager
def _writing(cache_folder: Path, name: str) -> Iterator[None]:
    """Turn an OSError raised in this block into a DataError that says how to fix it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{name}: decoded arrays can't be written to {cache_folder} on {socket.gethostname()}: {error}. "
            "Make room or fix the folder, or name another in FLEXIFED_CACHE_DIR."
        ) from error
