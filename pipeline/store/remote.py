"""Reading files behind URLs through fsspec: S3, Google Storage, Azure, Hugging Face and web servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from capgap.pipeline.store.extras import adding
from capgap.pipeline.store.files import MAX_SMALL_BYTES, too_large
from capgap.schemas.errors import CapgapError, InputError, MachineError, SettingError
from capgap.schemas.secrets import require_no_credential

# A request of this size takes much longer than its latency, and little memory compared with a decoded window.
_CHUNK_BYTES = 8 << 20
# Only schemes that return stored bytes are allowed. Others could start a program, mount or unpack something, such as
# `pipe:`, `exec:`, chains like `zip::` or `simplecache::`, and any scheme that an installed package registers.
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class Remote:
    """A folder behind a URL.

    Each client looks up addresses and credentials in its usual places, for example AWS_ENDPOINT_URL and
    AWS_ACCESS_KEY_ID.

    Args:
        url: URL of the folder.

    Raises:
        SettingError: The URL contains a credential.
    """

    def __init__(self, url: str) -> None:
        try:
            require_no_credential("the URL", url)
        except ValueError as error:
            where, _, what = str(error).partition(": ")
            raise SettingError(what, where=where) from None
        self.url = url.rstrip("/")

    def read(self, path: str) -> bytes | None:
        """Read a whole small file; return None if it does not exist.

        Raises:
            MachineError: The client for such URLs is not installed.
            InputError: The file cannot be read, or is larger than 256 MiB.
        """
        try:
            data = b""
            for chunk in self._chunks(path):
                data += chunk
                if len(data) > MAX_SMALL_BYTES:
                    raise too_large(f"{self.url}/{path}")
            return data
        except FileNotFoundError:
            return None

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a file in pieces.

        Raises:
            MachineError: The client for such URLs is not installed.
            InputError: The file cannot be read or does not exist.
        """
        try:
            yield from self._chunks(path)
        except FileNotFoundError:
            raise InputError(
                f"the {'shard' if path.endswith('.tar') else 'file'} is missing",
                where=f"{self.url}/{path}",
                fix="upload the whole folder of the stage again",
            ) from None

    def _chunks(self, path: str) -> Iterator[bytes]:
        url = f"{self.url}/{path}"
        with (
            client_errors(url),
            client_of(self.url, "shards are not read").open(url, "rb", block_size=_CHUNK_BYTES) as file,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


@contextlib.contextmanager
def client_errors(url: str) -> Iterator[None]:
    """Turn a client's errors into InputError, except for FileNotFoundError if the file really does not exist."""
    try:
        yield
    except (CapgapError, GeneratorExit):
        raise
    except Exception as error:  # each client has its own errors, without a common base class
        if isinstance(error, FileNotFoundError) and _is_absence(error):
            raise
        raise InputError(
            "cannot be read",
            where=url,
            found=f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}",
            fix="check the address and the credentials, then run the same command again",
        ) from None


def client_of(url: str, refusal: str) -> Any:
    """Return the fsspec file system of a URL.

    Args:
        url: The URL.
        refusal: Beginning of the error for a scheme that is not allowed, for example "shards are not read".

    Raises:
        InputError: The URL's scheme is none of `SCHEMES`.
        MachineError: The client for the scheme is not installed.
    """
    # not kept by the caller: fsspec keeps one client for each process, and refuses to use a client from before a fork,
    # such as the start of a DataLoader's worker
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise InputError(
            f"{refusal} from such a URL", where=url, found=f"{scheme}://", expected=f"one of {', '.join(SCHEMES)}"
        )
    # imported only here, because a run whose files are all on local disks does not need it
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        fix = f"run {adding(_EXTRAS[scheme])}" if scheme in _EXTRAS else None
        raise MachineError(f"{scheme}:// cannot be read here", where=url, found=error, fix=fix) from None


def _is_absence(error: FileNotFoundError) -> bool:
    """Return whether the file really does not exist; the web client raises the same error if no server answers."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404
