"""Hypothesis strategies for damaged files: valid bytes, changed as disks, networks and people change them."""

from __future__ import annotations

from hypothesis import strategies as st


def damaged(content: bytes, *, most_edits: int = 3) -> st.SearchStrategy[bytes]:
    """The content after edits that flip, replace, delete, insert, repeat or truncate bytes. May end up unchanged."""

    def edited(before: bytes) -> st.SearchStrategy[bytes]:
        return st.one_of(_flipped(before), _replaced(before), _truncated(before), _repeated(before))

    strategy = st.just(content)
    for _ in range(most_edits):
        strategy = strategy | strategy.flatmap(edited)
    return strategy.flatmap(edited)


def _position(content: bytes) -> st.SearchStrategy[int]:
    """Any position, more often near the ends, where headers and footers are."""
    last = len(content)
    return st.one_of(st.integers(0, min(64, last)), st.integers(max(0, last - 64), last), st.integers(0, last))


def _flipped(content: bytes) -> st.SearchStrategy[bytes]:
    def flip(position: int, mask: int) -> bytes:
        if position >= len(content):
            return content
        return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]

    return st.builds(flip, _position(content), st.integers(1, 255))


def _replaced(content: bytes) -> st.SearchStrategy[bytes]:
    """A range replaced by fewer or more bytes, so that deletions and insertions are included."""

    def replace(start: int, length: int, new: bytes) -> bytes:
        return content[:start] + new + content[start + length :]

    return st.builds(replace, _position(content), st.integers(0, 4096), st.binary(max_size=64))


def _truncated(content: bytes) -> st.SearchStrategy[bytes]:
    return _position(content).map(lambda end: content[:end])


def _repeated(content: bytes) -> st.SearchStrategy[bytes]:
    return st.builds(lambda start, end: content + content[start:end], _position(content), _position(content))
