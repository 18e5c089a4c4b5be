"""Downloads of published files: resumed where they were interrupted, verified, and put in place only when complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.filesize import decimal

from flexifed.data.bars import byte_bar
from flexifed.data.locks import locked
from flexifed.errors import DataError

TIMEOUT_S = 60.0
"""A connection that delivers nothing for this long counts as lost."""
ATTEMPTS = 5
"""Maximum number of requests to one URL, provided that each of them delivers something."""
CHUNK_BYTES = 1 << 20
LOCK = ".flexifed-download.lock"


@contextmanager
def exclusive_download(folder: Path) -> Iterator[None]:
    """In this block, no other process downloads into the folder, which is created if missing.

    Raises:
        DataError: the folder can't be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, f"waiting for another process that downloads into {folder}"))
        except OSError as error:
            raise DataError(
                f"nothing can be downloaded into {folder}: {error}. Choose a folder that you may write to."
            ) from error
        yield


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A published file.

    Attributes:
        name: file name.
        urls: its URLs, tried in this order.
        num_bytes: its size, for display only; the size that the server reports is authoritative.
        checksum: algorithm and hexadecimal digest: `md5:...` or `sha256:...`.
    """

    name: str
    urls: Sequence[str]
    num_bytes: int
    checksum: str

    @property
    def size(self) -> str:
        """The size, formatted."""
        return decimal(self.num_bytes)


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Download a file into a folder, unless it is already there.

    A partial download is kept in `<name>.part`, and the next call resumes it. A different file of the same name is
    renamed to `<name>.old`. Callers that may run at the same time must use `exclusive_download`.

    Returns:
        The file's path.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    path = folder / file.name
    part = folder / f"{file.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_published(path, file.checksum):
            _fetch_part(file, part)
            if path.exists():
                put_aside(path)
            part.replace(path)
    except (OSError, HTTPException) as error:
        progress = (
            f" {decimal(part.stat().st_size)} are downloaded; run the same command again to resume."
            if part.exists()
            else ""
        )
        raise DataError(
            f"{file.name} could not be downloaded from {file.urls[0]} into {folder}: {type(error).__name__}: {error}. "
            f"It needs a network connection, and {file.size} in a folder that you may write to.{progress}"
        ) from error
    return path


def unpack(archive: Path, target: Path, *, within: str = ".") -> None:
    """Unpack a folder of a tar archive, completely or not at all. An existing `target` is renamed to `<target>.old`.

    Args:
        archive: path of the archive.
        target: path of the new folder.
        within: folder in the archive that becomes `target`.

    Raises:
        DataError: the archive is damaged or lacks the folder, there is no space, or `target` can't be written.
    """
    print(f"unpacking {archive.name} to {target}", file=sys.stderr, flush=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(temporary, filter="data")
        (temporary / within).stat()
        if os.path.lexists(target):
            put_aside(target)
        (temporary / within).rename(target)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{archive} could not be unpacked to {target}: {type(error).__name__}: {error}. "
            "Make room, or delete the archive to download it again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_aside(path: Path) -> Path:
    """Rename an existing file or folder to `<name>.old`, or the next free number; return the new path."""
    aside = path.with_name(f"{path.name}.old")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.old{number}")
    path.rename(aside)
    print(f"{path} already existed and was renamed to {aside.name}", file=sys.stderr, flush=True)
    return aside


def _is_published(path: Path, checksum: str) -> bool:
    return path.is_file() and _digest(path, checksum.partition(":")[0]) == checksum


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _fetch_part(file: RemoteFile, part: Path) -> None:
    """Complete the partial file from the first URL that serves the published contents.

    Raises:
        OSError: no URL does.
        HTTPException: the same.
    """
    print(f"downloading {file.name}, {file.size}, into {part.parent}", file=sys.stderr, flush=True)
    last_error: OSError | HTTPException | None = None
    for url in file.urls:
        try:
            _fetch_whole(url, part)
            if (checksum := _digest(part, file.checksum.partition(":")[0])) == file.checksum:
                return
            part.unlink()
            last_error = OSError(f"the file from {url} has the checksum {checksum}; expected {file.checksum}")
        except (OSError, HTTPException) as error:
            last_error = error
    assert last_error is not None
    raise last_error


def _fetch_whole(url: str, part: Path) -> None:
    """Request a URL until the file is complete, or until a request delivers nothing."""
    for attempt in range(ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part):
                return
            problem: OSError | HTTPException = OSError(f"the connection to {url} was lost")
        except HTTPError:
            raise
        except (OSError, HTTPException) as error:
            problem = error
        has_grown = part.exists() and part.stat().st_size > before
        if not has_grown or attempt == ATTEMPTS - 1:
            raise problem


def _fetch_rest(url: str, part: Path) -> bool:
    """Append the rest of the file until the connection ends; return whether the file is complete."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "flexifed"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and have:  # nothing follows what we have; the checksum will tell whether it is complete
            return True
        raise
    with response:
        resumes = response.status == 206 and (response.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        if response.status == 206 and have and not resumes:  # another range than requested, or an unknown one
            response.close()
            part.unlink()
            return _fetch_rest(url, part)
        start = have if resumes else 0
        total = None if response.length is None else start + response.length
        if total is not None and (free := shutil.disk_usage(part.parent).free) < total - start:
            raise OSError(f"{decimal(total - start)} are left to download, but only {decimal(free)} are free")
        with open(part, "ab" if resumes else "wb") as out, byte_bar() as progress:
            task = progress.add_task(part.stem, total=total, completed=start)
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                progress.advance(task, len(chunk))
            out.flush()
            os.fsync(out.fileno())
            return total is None or out.tell() == total
