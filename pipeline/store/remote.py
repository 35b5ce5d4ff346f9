"""Files behind URLs, through fsspec: S3, Google Storage, Azure, Hugging Face and web servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from capgap.pipeline.store.extras import adding
from capgap.pipeline.store.files import MAX_SMALL_BYTES, too_large
from capgap.schemas.errors import CapgapError, InputError, MachineError, SettingError
from capgap.schemas.secrets import require_no_credential

# Large enough that a request's latency is small beside its transfer, small beside the memory of a decoded window.
_CHUNK_BYTES = 8 << 20
# Where stored bytes come from, and nothing that could start a program, mount or unpack anything: `pipe:`, `exec:` and
# chains such as `zip::` or `simplecache::` among them, and whatever else an installed package has a name for.
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class Remote:
    """A folder behind a URL. Addresses and credentials come from where each client looks for them, for example
    AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID.

    Args:
        url: of the folder.

    Raises:
        SettingError: a credential stands in the URL.
    """

    def __init__(self, url: str) -> None:
        try:
            require_no_credential("the URL", url)
        except ValueError as error:
            where, _, what = str(error).partition(": ")
            raise SettingError(what, where=where) from None
        self.url = url.rstrip("/")

    def read(self, path: str) -> bytes | None:
        """A small file as a whole; None where there is none.

        Raises:
            MachineError: the client for such URLs is not installed.
            InputError: it cannot be read, or is no small file.
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
        """A file in pieces; errors as `read`, and a file that is not there is one."""
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
    """Whatever a client says of a URL as an error of ours; a file that is truly not there stays FileNotFoundError."""
    try:
        yield
    except (CapgapError, GeneratorExit):
        raise
    except Exception as error:  # every client has errors of its own, without a common root
        if isinstance(error, FileNotFoundError) and _is_absence(error):
            raise
        raise InputError(
            "cannot be read",
            where=url,
            found=f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}",
            fix="check the address and the credentials, then run the same command again",
        ) from None


def client_of(url: str, refusal: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
        InputError: its scheme is none of `SCHEMES`.
        MachineError: its client is not installed.
    """
    # fsspec keeps one a process; one from before a fork, as a worker of a DataLoader is, would be refused there
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise InputError(
            f"{refusal} from such a URL", where=url, found=f"{scheme}://", expected=f"one of {', '.join(SCHEMES)}"
        )
    # here, for a run whose files are all on local disks asks for none of its clients
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        fix = f"run {adding(_EXTRAS[scheme])}" if scheme in _EXTRAS else None
        raise MachineError(f"{scheme}:// cannot be read here", where=url, found=error, fix=fix) from None


def _is_absence(error: FileNotFoundError) -> bool:
    """Whether the file is truly not there: the web client says the same where the server does not answer."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404
