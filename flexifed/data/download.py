"""Published files from their addresses: resumed where a download was cut off, checked, and in place only when whole."""

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
"""Without a byte for so long, a connection counts as lost."""
ATTEMPTS = 5
"""So often is an address asked, as long as each time brings something."""
CHUNK_BYTES = 1 << 20
LOCK = ".flexifed-download.lock"


@contextmanager
def exclusive_download(folder: Path) -> Iterator[None]:
    """Download into a folder while no other process does; make it where it is missing.

    Raises:
        DataError: it can't be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, f"waiting for another process that downloads into {folder}"))
        except OSError as error:
            raise DataError(
                f"nothing can be downloaded into {folder}: {error}. It takes a folder that you may write to."
            ) from error
        yield


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as it was published.

    Attributes:
        name: of the file.
        urls: its addresses, tried in this order.
        num_bytes: its size, to be shown; the server's word is what counts.
        checksum: algorithm and hexadecimal digest: `md5:...` or `sha256:...`.
    """

    name: str
    urls: Sequence[str]
    num_bytes: int
    checksum: str

    @property
    def size(self) -> str:
        """The size for people."""
        return decimal(self.num_bytes)


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Get a file into a folder, unless it lies there already.

    What has come lies in `<name>.part` until it is whole, and the next call goes on from there. Another file of that
    name goes aside, to `<name>.old`. Processes that may do this at once take turns (`exclusive_download`).

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
        so_far = (
            f" {decimal(part.stat().st_size)} of it have come, and the same command goes on." if part.exists() else ""
        )
        raise DataError(
            f"{file.name} could not be downloaded from {file.urls[0]} into {folder}: {type(error).__name__}: {error}. "
            f"It takes a network, and {file.size} in a folder that you may write to.{so_far}"
        ) from error
    return path


def unpack(archive: Path, target: Path, *, within: str = ".") -> None:
    """Unpack a folder of a tar archive, which is there whole or not at all. What lies there goes aside.

    Args:
        archive: its path.
        target: the new folder.
        within: the archive's folder that becomes it.

    Raises:
        DataError: it is no such archive, there is no space, or the folder can't be written.
    """
    print(f"unpacking {archive.name} to {target}", file=sys.stderr, flush=True)
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(beside, filter="data")
        (beside / within).stat()
        if target.exists():
            put_aside(target)
        (beside / within).rename(target)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{archive} could not be unpacked to {target}: {type(error).__name__}: {error}. "
            "Make room, or delete the archive to have it fetched anew."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_aside(path: Path) -> Path:
    """Rename a file or folder to a free name beside it, and say so; returns the new one."""
    aside = path.with_name(f"{path.name}.old")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.old{number}")
    path.rename(aside)
    print(f"{path} was there already and is {aside.name} now", file=sys.stderr, flush=True)
    return aside


def _is_published(path: Path, checksum: str) -> bool:
    return path.is_file() and _digest(path, checksum.partition(":")[0]) == checksum


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _fetch_part(file: RemoteFile, part: Path) -> None:
    """Complete the part file from the first address that has the published contents.

    Raises:
        OSError: none of them has.
        HTTPException: the same.
    """
    print(f"downloading {file.name}, {file.size}, into {part.parent}", file=sys.stderr, flush=True)
    last: OSError | HTTPException | None = None
    for url in file.urls:
        try:
            _fetch_whole(url, part)
            if (found := _digest(part, file.checksum.partition(":")[0])) == file.checksum:
                return
            part.unlink()
            last = OSError(f"what came from {url} has the checksum {found} and should have {file.checksum}")
        except (OSError, HTTPException) as error:
            last = error
    assert last is not None
    raise last


def _fetch_whole(url: str, part: Path) -> None:
    """Ask an address until it has given all it has."""
    for attempt in range(ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part):
                return
            problem: OSError | HTTPException = OSError(f"{url} was cut off")
        except HTTPError:
            raise
        except (OSError, HTTPException) as error:
            problem = error
        has_grown = part.exists() and part.stat().st_size > before
        if not has_grown or attempt == ATTEMPTS - 1:
            raise problem


def _fetch_rest(url: str, part: Path) -> bool:
    """Add to a part file what it lacks, as far as the connection lasts; returns whether it is whole now."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "flexifed"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and have:  # nothing lies behind what is here: the checksum tells whether that is all
            return True
        raise
    with response:
        goes_on = response.status == 206 and (response.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        if response.status == 206 and have and not goes_on:  # another part than was asked for, or who knows which
            response.close()
            part.unlink()
            return _fetch_rest(url, part)
        start = have if goes_on else 0
        total = None if response.length is None else start + response.length
        if total is not None and (free := shutil.disk_usage(part.parent).free) < total - start:
            raise OSError(f"there are {decimal(free)} free, and {decimal(total - start)} to come")
        with open(part, "ab" if goes_on else "wb") as out, byte_bar() as progress:
            task = progress.add_task(part.stem, total=total, completed=start)
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                progress.advance(task, len(chunk))
            out.flush()
            os.fsync(out.fileno())
            return total is None or out.tell() == total
