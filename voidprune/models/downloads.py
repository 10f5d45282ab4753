"""Byte ranges of files on the Hugging Face Hub, over HTTP. What they mean is known in `remote.py`.

URLs, authentication and the HTTP client are huggingface_hub's own, so that its settings (HF_ENDPOINT, HF_TOKEN, proxies) hold here
too. That client is `requests` in 0.x, httpx in 1.x and httpx2 in 2.x; only what they share is used.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from voidprune.errors import CheckpointError, ModelError

_TIMEOUT = 30.0  # seconds without a byte
_PIECE = 1 << 20


class RangesIgnored(Exception):  # noqa: N818  no error: the server sends whole files only
    """The server answered a request for a range with the whole file."""


@dataclass(frozen=True)
class Patience:
    """How often a request that brought nothing is repeated, and how many seconds to wait before; each wait is twice the last."""

    attempts: int = 6
    first_wait: float = 0.5


@dataclass(frozen=True)
class RemoteFile:
    """One file of one commit. `size` in bytes; `etag` without quotes, for large files the SHA-256 of the content."""

    repo: str
    name: str
    commit: str
    size: int
    etag: str

    @property
    def place(self) -> str:
        """Its name in errors."""
        return f"{self.name} of {self.repo}"


PATIENCE = Patience()

Sink = Callable[[int, bytes], None]
"""Takes bytes and their offset in the file."""


def inspect_file(repo: str, name: str, commit: str) -> RemoteFile:
    """Ask for size and ETag of a file. Raises ModelError."""
    from huggingface_hub import get_hf_file_metadata

    try:
        found = get_hf_file_metadata(_url(repo, name, commit))
    except client_errors() as error:
        raise ModelError(f"{name} of {repo} cannot be fetched: {first_line(error)}", hint="try again later") from error
    if found.size is None or found.etag is None or found.commit_hash not in (None, commit):
        raise CheckpointError(f"the Hub does not say how long {name} of {repo} at {commit} is", hint="try again later")
    return RemoteFile(repo, name, commit, size=found.size, etag=found.etag)


def fetch_range(file: RemoteFile, offset: int, length: int, sink: Sink, *, patience: Patience = PATIENCE) -> None:
    """Bring bytes [offset, offset + length), going on where a connection broke off.

    Raises RangesIgnored where the server sends the whole file instead, CheckpointError where the file is not the one that was
    inspected, ModelError where nothing more arrives.
    """

    def receive(got: int) -> Generator[int, None, None]:
        with _get(file, {"Range": f"bytes={offset + got}-{offset + length - 1}"}) as response:
            response.check(file)
            if response.status == 200:
                raise RangesIgnored(file.place)
            response.check_range(file, offset + got)
            for piece in response.pieces:
                sink(offset + got, piece[: length - got])
                got += len(piece)
                yield len(piece)

    _repeat(file, length, receive, patience=patience, resumes=True)


def fetch_whole(file: RemoteFile, sink: Sink, *, length: int | None = None, patience: Patience = PATIENCE) -> None:
    """Bring a file, or its first `length` bytes, from a server that knows no ranges: what breaks off starts again.

    Raises as `fetch_range` does.
    """
    wanted = file.size if length is None else length

    def receive(got: int) -> Generator[int, None, None]:
        with _get(file, {}) as response:
            response.check(file)
            for piece in response.pieces:
                sink(got, piece[: wanted - got])
                got += len(piece)
                yield len(piece)

    _repeat(file, wanted, receive, patience=patience, resumes=False)


def fetch_start(file: RemoteFile, length: int, *, patience: Patience = PATIENCE) -> tuple[bytes, bool]:
    """The first `length` bytes of a file, and whether the server knows ranges: one that does not is cut off after them."""
    content = bytearray(length)

    def sink(offset: int, piece: bytes) -> None:
        content[offset : offset + len(piece)] = piece

    try:
        fetch_range(file, 0, length, sink, patience=patience)
    except RangesIgnored:
        fetch_whole(file, sink, length=length, patience=patience)
        return bytes(content), False
    return bytes(content), True


def _repeat(
    file: RemoteFile,
    wanted: int,
    receive: Callable[[int], Generator[int, None, None]],
    *,
    patience: Patience,
    resumes: bool,
) -> None:
    """Receive until `wanted` bytes have arrived. `receive(got)` yields the lengths of the pieces behind the first `got` bytes."""
    got = failures = 0
    while got < wanted:
        before = got
        got = got if resumes else 0
        reason = "it sends too little"
        pieces = receive(got)
        try:
            for length in pieces:
                got += length
                if got >= wanted:
                    break
        except _Temporary as error:
            reason = str(error)
        except client_errors() as error:
            reason = first_line(error)
        finally:
            pieces.close()  # and with it the connection
        if got >= wanted:
            return
        failures = 0 if resumes and got > before else failures + 1
        if failures >= patience.attempts:
            raise ModelError(
                f"{file.place} cannot be fetched: {reason} ({got:,} of {wanted:,} bytes arrived)",
                hint="run the command again: it goes on where it stopped",
            )
        if failures:
            time.sleep(patience.first_wait * 2 ** (failures - 1))


# ---- the client that huggingface_hub brings


class _Temporary(Exception):  # noqa: N818  no error yet: the request is repeated
    """The server is busy or broken for the moment."""


@dataclass(frozen=True)
class _Response:
    """What requests and httpx agree about. `first` has the headers of the Hub's own answer, before it sent us elsewhere."""

    status: int
    headers: Mapping[str, str]
    first: Mapping[str, str]
    redirected: bool
    pieces: Iterator[bytes]

    def check(self, file: RemoteFile) -> None:
        """Raises where this is no answer, or one about another file than the one that was inspected."""
        if self.status == 429 or self.status >= 500:
            raise _Temporary(f"the Hub answers {self.status}")
        if self.status not in (200, 206):
            raise ModelError(f"{file.place} cannot be fetched: the Hub answers {self.status}", hint="check your access")
        tag = self.first.get("x-linked-etag") or (None if self.redirected else self.first.get("etag"))
        if tag is not None and tag.strip().removeprefix("W/").strip('"') != file.etag:
            raise CheckpointError(
                f"{file.place} changed while it was being fetched: its ETag is another", hint=_CHANGED
            )
        commit = self.first.get("x-repo-commit")
        if commit is not None and commit != file.commit:
            raise CheckpointError(
                f"{file.place} changed while it was being fetched: its commit is another", hint=_CHANGED
            )

    def check_range(self, file: RemoteFile, position: int) -> None:
        declared = self.headers.get("content-range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", declared.strip())
        if match is None or int(match[1]) != position:
            raise CheckpointError(
                f"{file.place}: the Hub sends {declared!r} for a range from {position}", hint=_CHANGED
            )
        if match[3] not in ("*", str(file.size)):
            raise CheckpointError(
                f"{file.place} has {match[3]} bytes where it is stored; the Hub says {file.size}", hint=_CHANGED
            )


_CHANGED = "run the command again; if it stays, download the whole model and give its folder"


@contextmanager
def _get(file: RemoteFile, headers: Mapping[str, str]) -> Iterator[_Response]:
    import huggingface_hub.utils

    hub: Any = huggingface_hub.utils
    url = _url(file.repo, file.name, file.commit)
    headers = {**hub.build_hf_headers(), "Accept-Encoding": "identity", **headers}
    session = hub.get_session()
    if callable(getattr(session, "stream", None)):  # httpx and httpx2; in requests it is a flag
        with session.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            yield _describe(response, response.iter_bytes(_PIECE))
    else:
        with session.get(url, headers=headers, timeout=_TIMEOUT, allow_redirects=True, stream=True) as response:
            yield _describe(response, response.iter_content(_PIECE))


def _describe(response: Any, pieces: Iterator[bytes]) -> _Response:
    first = response.history[0] if response.history else response
    return _Response(
        status=response.status_code,
        headers=response.headers,
        first=first.headers,
        redirected=bool(response.history),
        pieces=pieces,
    )


def client_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub and its HTTP client raise when the other side cannot be reached, says no, or breaks off."""
    import huggingface_hub.utils
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub: Any = huggingface_hub.utils
    found: list[type[Exception]] = [HfHubHTTPError, HFValidationError, OSError]  # requests' errors are OSErrors
    for kind in type(hub.get_session()).__mro__:
        error = getattr(sys.modules.get(kind.__module__.partition(".")[0]), "HTTPError", None)
        if isinstance(error, type) and issubclass(error, Exception):
            found.append(error)
    return tuple(found)


def access_hint(error: Exception) -> str:
    """What to do about a model that cannot be looked up."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return "accept its terms on its page on the Hub, then: hf auth login"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return "check the spelling; where it is private: hf auth login"
    return "check the spelling; offline, give the path of a local folder"


def _url(repo: str, name: str, commit: str) -> str:
    from huggingface_hub import constants, hf_hub_url

    return str(hf_hub_url(repo, name, revision=commit, endpoint=constants.ENDPOINT))


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
