"""Downloads from a local server that drops connections, ignores ranges, or serves the wrong contents."""

from __future__ import annotations

import io
import socket
import tarfile
from pathlib import Path

import pytest
from serving import CONTENT, Server

from flexifed.data.download import ATTEMPTS, RemoteFile, fetch, unpack
from flexifed.errors import DataError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name[0] != "."}


def test_file_is_downloaded_once_and_its_size_shown(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert fetch(server.file(), tmp_path / "new").read_bytes() == CONTENT
    assert server.requested_ranges == [None]
    assert names(tmp_path / "new") == {"set.tar.gz"}
    assert "downloading set.tar.gz, 100.0 kB, into " in capsys.readouterr().err


def test_interrupted_download_resumes(server: Server, tmp_path: Path) -> None:
    server.cut_after = 30_000
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_the_next_call_resumes_a_download(server: Server, tmp_path: Path) -> None:
    server.cut_after = 15_000
    with pytest.raises(DataError, match=r"set.tar.gz could not .* was lost.* 75.0 kB are downloaded; run the same com"):
        fetch(server.file(), tmp_path)
    assert len(server.requested_ranges) == ATTEMPTS
    assert names(tmp_path) == {"set.tar.gz.part"}
    server.cut_after = None
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges[-1] == "bytes=75000-"


def test_download_restarts_if_the_server_ignores_ranges(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT[:100])
    server.knows_ranges = False
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("content_range", ["", "bytes 7-99999/100000", "nonsense"])
def test_download_restarts_if_the_server_sends_another_range(
    content_range: str, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT[:100])
    server.range_of_answer = content_range
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == ["bytes=100-", None]


def test_a_part_with_all_bytes_is_accepted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT)
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


def test_wrong_contents_are_deleted(server: Server, tmp_path: Path) -> None:
    server.content = b"not the published file"
    with pytest.raises(DataError, match=r"the file from http.* has the checksum md5:\w+; expected md5:\w+"):
        fetch(server.file(), tmp_path)
    assert names(tmp_path) == set()


def test_damaged_part_is_deleted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match="expected md5"):
        fetch(server.file(), tmp_path)
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


def test_other_urls_are_tried(server: Server, tmp_path: Path) -> None:
    missing, present = server.file("/gone"), server.file()
    file = RemoteFile(name=present.name, urls=(*missing.urls, *present.urls), num_bytes=1, checksum=present.checksum)
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"HTTPError: HTTP Error 404"):
        fetch(missing, tmp_path / "other")


def test_another_file_of_that_name_is_renamed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        (tmp_path / "set.tar.gz").write_bytes(b"%d" % index)
        fetch(server.file(), tmp_path)
    assert names(tmp_path) == {"set.tar.gz", "set.tar.gz.old", "set.tar.gz.old2"}
    assert (tmp_path / "set.tar.gz.old2").read_bytes() == b"1"
    assert "was renamed to set.tar.gz.old2" in capsys.readouterr().err


def test_a_download_without_a_network_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set.tar.gz"
        with pytest.raises(
            DataError, match=r"Connection refused.* It needs a network connection, and 5 bytes in a folder"
        ):
            fetch(RemoteFile(name="set.tar.gz", urls=(url,), num_bytes=5, checksum="md5:0"), tmp_path)


# Unpacking


def write_tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as opened:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path


def test_archive_is_unpacked_to_its_place(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "set.tar.gz", {"./train/cat/1.png": b"1", "./readme": b"2"})
    unpack(archive, tmp_path / "set")
    assert (tmp_path / "set" / "train" / "cat" / "1.png").read_bytes() == b"1"
    unpack(write_tar(archive, {"within/2.png": b"2"}), tmp_path / "set", within="within")
    assert names(tmp_path / "set") == {"2.png"}
    assert (tmp_path / "set.old" / "readme").read_bytes() == b"2"
    assert {path.name for path in tmp_path.iterdir()} == {"set.tar.gz", "set", "set.old"}


def test_a_link_to_nothing_is_put_aside_too(tmp_path: Path) -> None:
    for name in ("set", "set.old"):
        (tmp_path / name).symlink_to(tmp_path / "not mounted")
    unpack(write_tar(tmp_path / "set.tar.gz", {"./readme": b"2"}), tmp_path / "set")
    assert (tmp_path / "set" / "readme").read_bytes() == b"2"
    assert (tmp_path / "set.old").is_symlink()
    assert (tmp_path / "set.old2").is_symlink()


@pytest.mark.parametrize("damage", ["cut", "other", "escape", "without"])
def test_bad_archive_changes_nothing(damage: str, tmp_path: Path) -> None:
    name = {"escape": "../outside", "without": "elsewhere/1.png"}.get(damage, "set/1.png")
    archive = write_tar(tmp_path / "set.tar.gz", {name: CONTENT})
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "other":
        content[:] = b"not found"
    archive.write_bytes(content)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(
        DataError, match=r"(?s)set.tar.gz could not be unpacked to .*set: .* Make room, or delete the ar"
    ):
        unpack(archive, tmp_path / "set", within="set")
    assert {path.name for path in tmp_path.iterdir()} == {"set.tar.gz", "set"}
    assert names(tmp_path / "set") == {"mine"}
