"""Files on other machines: ranges of bytes over HTTP(S), and over s3:// or gs:// where fsspec is installed.

In: a URL, an offset and a size. Out: exactly those bytes. After a dropped connection the download goes on at the byte
where it dropped, at most RETRIES times per call; `retries` counts them.
"""

import fcntl
import hashlib
import http.client
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from shards.errors import InputError

RETRIES = 5  # per call; with the pauses below, enough for a server that restarts within half a minute
_TIMEOUT = 30.0  # seconds without a byte
_FIRST_PAUSE = 0.5  # seconds before the second try; doubled each time, with up to a quarter more at random
_LONGEST_PAUSE = 10.0
_PIECE = 1 << 20  # bytes per recv: what was received is kept when the connection drops
_OBJECT_PIECE = 8 << 20  # bytes per request through fsspec, which returns a request as a whole
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that may pass: try again

retries = 0  # connections of this process that dropped or were refused and were tried again

# Packages that a URL needs besides fsspec.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


class _Changed(Exception):
    """The file on the server was replaced while it was read."""


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes `offset` to `offset + size` of a remote file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: no access, the file is shorter, no server after RETRIES further tries, or a package that the URL
            needs is not installed.
    """
    if size == 0:
        return b""
    data = bytearray()
    for piece in _pieces(url, offset, size):
        data += piece
    return bytes(data)


def read_file(url: str) -> bytes:
    """The bytes of a whole remote file. Raises as read_range does."""
    return read_range(url, 0, size_of(url))


def size_of(url: str) -> int:
    """Number of bytes of a remote file. Raises as read_range does."""
    if not _is_http(url):
        return _attempts(url, lambda: int(_filesystem(url).size(url)))

    def ask() -> int:
        # A GET of one byte, not HEAD: signed URLs of object stores allow GET only.
        with _request(url, 0, 1) as response:
            return _total(response, url)

    return _attempts(url, ask)


def cached(url: str, folder: str, size: int, sha256: str) -> str:
    """Path of a copy of a remote file in a local folder, fetched by the first process of the machine that asks for it.

    A copy that was interrupted is completed. `size` and `sha256` are those of the index; 0 and empty: not known.

    Raises:
        InputError: as read_range does; or the folder cannot be written, or the file is not the one that was packed.
    """
    # Size and digest are part of the name: shards packed again under the same URL get another one.
    digest = hashlib.sha256(f"{url} {size} {sha256}".encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{digest}-{re.sub('[^A-Za-z0-9._-]', '_', url.rpartition('/')[2])}")
    if _is_kept(path, size):
        return path
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # when its holder dies, the system frees it
            if not _is_kept(path, size):
                _fetch(url, f"{path}.part", size, sha256)
                os.replace(f"{path}.part", path)
    except FileNotFoundError:
        raise InputError(f"{url} is not there", False) from None
    except OSError as error:
        raise InputError(
            f"cannot keep {url} in {folder}: {error.strerror or error}; SHARDS_CACHE must name a folder with room for "
            "all shards (none is ever removed); without it each image is fetched when it is needed",
            False,
        ) from None
    return path


def _is_kept(path: str, size: int) -> bool:
    try:
        return os.path.getsize(path) == size or not size
    except OSError:
        return False


def _fetch(url: str, path: str, size: int, sha256: str) -> None:
    """Append to a local file what it lacks of the remote one, and check the whole."""
    size = size or size_of(url)
    with open(path, "a+b") as file:
        if file.tell() > size:
            file.truncate(0)
        for piece in _pieces(url, file.tell(), size - file.tell()):
            file.write(piece)
        file.flush()
        file.seek(0)
        if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            file.truncate(0)
            raise InputError(f"{url} is damaged or was replaced: its sha256 is not the one in the index", False)


def list_tars(url: str) -> list[str]:
    """URLs of all tars below an s3:// or gs:// folder. Raises InputError for HTTP, which has no listing."""
    if _is_http(url):
        raise InputError(
            f"a web server does not list its files: give {url} as a pattern of tars, for example "
            f"--splits 'train={url.rstrip('/')}/train-{{000000..000127}}.tar'"
        )
    scheme = url.partition("://")[0]
    names = _attempts(url, lambda: _filesystem(url).find(url))
    return sorted(f"{scheme}://{name}" for name in names if name.endswith(".tar"))


def _pieces(url: str, offset: int, size: int) -> Iterator[bytes]:
    """A range of bytes in pieces, in order; after a failure the rest is requested again."""
    download, failures = _Download(url, offset, size), [0]
    try:
        while download.at < download.end:
            yield _attempts(url, download.piece, download.close, failures)
    finally:
        download.close()


class _Download:
    """Bytes `at` to `end` of a remote file, which are still to be received."""

    def __init__(self, url: str, offset: int, size: int):
        self.at, self.end = offset, offset + size
        self._url = url
        self._response: http.client.HTTPResponse | None = None
        self._tag: tuple[str | None, int] | None = None  # ETag and size of the file, as in the first answer

    def piece(self) -> bytes:
        """The next bytes. Raises InputError if the file ends before them, ConnectionError if the connection does."""
        left = self.end - self.at
        if not _is_http(self._url):
            data = _filesystem(self._url).cat_file(self._url, start=self.at, end=self.at + min(left, _OBJECT_PIECE))
        else:
            if self._response is None:
                self._response = _request(self._url, self.at, left)
                tag = (self._response.headers.get("ETag"), _total(self._response, self._url))
                if self._tag not in (None, tag):
                    raise _Changed
                self._tag = tag
            data = self._response.read1(min(left, _PIECE))
        if not data:
            size = self._tag[1] if self._tag else _filesystem(self._url).size(self._url)
            if size < self.end:
                raise InputError(f"{self._url} has {size} bytes, but bytes up to {self.end} were to be read", False)
            raise ConnectionError("the connection ended early")
        self.at += len(data)
        return data

    def close(self) -> None:
        """End the connection; the next piece opens another."""
        if self._response is not None:
            self._response.close()
            self._response = None


def _attempts(url: str, action: Callable, forget: Callable = lambda: None, failures: list[int] | None = None):
    """The result of `action()`, tried again after failures that may pass.

    There are at most RETRIES further tries over all calls that share `failures`; `forget()` is called before each.
    """
    global retries
    failures = [0] if failures is None else failures
    while True:
        try:
            return action()
        except Exception as error:  # fsspec passes on what its clients raise (botocore, aiohttp)
            if (final := _final_error(url, error)) is not None:
                raise final from None
            reason = " ".join(str(getattr(error, "reason", "") or error).split()) or type(error).__name__
        forget()
        if failures[0] >= RETRIES:
            raise InputError(f"cannot read {url}: {reason} (given up after {RETRIES} retries)", False)
        pause = min(_FIRST_PAUSE * 2 ** failures[0], _LONGEST_PAUSE) * random.uniform(1, 1.25)
        failures[0] += 1
        retries += 1
        time.sleep(pause)


def _final_error(url: str, error: Exception) -> Exception | None:
    """The error to raise; None: it may pass."""
    if isinstance(error, InputError | FileNotFoundError):
        return error
    if isinstance(error, _Changed):
        return InputError(f"{url} changed while it was read; start again", False)
    if isinstance(error, PermissionError):
        return InputError(f"no access to {url}: {error}", False)
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code in (404, 410):
            return FileNotFoundError(2, "there is no such file", url)
        if error.code == 416:
            return InputError(f"{url} is shorter than its index says; download both again", False)
        return (
            None
            if error.code in _PASSING
            else InputError(f"no access to {url}: HTTP {error.code} {error.reason}", False)
        )
    passes = isinstance(error, OSError | http.client.HTTPException | EOFError) or not _is_http(url)
    return None if passes else error


def _is_http(url: str) -> bool:
    return url.partition("://")[0].lower() in ("http", "https")


# HTTP by the standard library, not by fsspec: no threads (fsspec's event loop does not survive a fork), proxy variables
# are honoured, and what was received before a connection dropped is kept.
def _request(url: str, offset: int, size: int) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    if not urllib.request.urlparse(response.url).scheme.lower().startswith("http"):
        raise InputError(f"{url} leads to {response.url}, which is not HTTP", False)
    if response.status == 200:
        # The server sends the whole file, which is useful only if its start is wanted.
        if offset:
            response.close()
            raise InputError(f"the server of {url} has no range requests; copy the shards to a file system", False)
    elif int(response.headers.get("Content-Range", "bytes -1-").split()[1].partition("-")[0]) != offset:
        response.close()
        raise http.client.HTTPException("the server sent another range than requested")
    return response


def _total(response: http.client.HTTPResponse, url: str) -> int:
    """Size of the whole file, from the headers of an answer to a range request."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    total = total if response.status == 206 else response.headers.get("Content-Length", "")
    if not total.isdigit():
        raise InputError(f"the server of {url} does not tell the file's size; copy the shards to a file system", False)
    return int(total)


_filesystems: dict[tuple[int, str], object] = {}


def _filesystem(url: str):
    """fsspec's file system for a URL; one per process, since it does not survive a fork."""
    scheme = url.partition("://")[0].lower()
    key = (os.getpid(), scheme)
    if key not in _filesystems:
        try:
            import fsspec

            _filesystems[key] = fsspec.filesystem(scheme, skip_instance_cache=True)
        except ImportError:
            package = _PACKAGES.get(scheme, "")
            raise InputError(f"{scheme}:// needs further packages: pip install fsspec {package}".rstrip()) from None
    return _filesystems[key]
