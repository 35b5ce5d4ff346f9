"""Check that a model or tokenizer of the run file can be found, before anything is made and without loading it.

A name that can only be a path is looked for on this machine alone, so that a misspelt folder is reported at once, and
not after several requests to the hub.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from capgap.schemas.errors import InputError, MachineError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""The files of which a tokenizer's folder has at least one."""

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT_S = 10.0


def is_local(path: str) -> bool:
    """Return whether a name means a local path: it exists, or it cannot be an id, or its parent folder exists."""
    if Path(path).exists() or path.startswith((".", "/", "~")) or _ID.fullmatch(path) is None:
        return True
    parent = Path(path).parent
    return parent != Path() and parent.is_dir()


def require_findable(path: str, setting: str, files: Sequence[str] = ("config.json",)) -> None:
    """Refuse a folder that does not exist or lacks the files, and an id that is neither downloaded nor on the hub.

    Args:
        path: folder or id, as given.
        setting: the setting that names it, for errors.
        files: names of files; the folder must hold at least one of them.

    Raises:
        InputError: there is no such folder, file or id.
        MachineError: the id is not on this machine, and the hub cannot be reached.
    """
    if is_local(path):
        _require_folder(path, setting, files)
    else:
        require_id(path, f"{setting}: {path}", files)


def require_id(path: str, where: str, files: Sequence[str] = ("config.json",)) -> None:
    """Refuse an id that is neither on this machine nor on the hub.

    It asks the hub once, so that a missing network shows at once, and not after half a minute of the client's retries.

    Args:
        path: folder or id; a local path is not checked.
        where: name of the model or tokenizer in errors.
        files: names of files; a downloaded model or tokenizer has at least one of them on this machine.

    Raises:
        InputError: there is no such id.
        MachineError: the id is not on this machine, and the hub cannot be reached.
    """
    if not is_local(path) and not any(_is_downloaded(path, file) for file in files):
        _ask_hub(path, where)


def _require_folder(path: str, setting: str, files: Sequence[str]) -> None:
    folder = Path(path)
    expected = f"a Hugging Face folder with {' or '.join(files)}, or an id such as owner/name"
    if folder.is_dir():
        if not any((folder / file).is_file() for file in files):
            if "config.json" in files:
                from capgap.pipeline.models.weight_files import no_config

                raise no_config([one.name for one in folder.iterdir() if one.is_file()], f"{setting}: {path}")
            raise InputError(
                "the folder lacks the files",
                where=f"{setting}: {path}",
                found=f"no {' and no '.join(files)}",
                expected=expected,
            )
        return
    if folder.exists():
        raise InputError("not a folder", where=f"{setting}: {path}", found="a file", expected=expected)
    raise InputError(
        "no such folder",
        where=f"{setting}: {path}",
        found="nothing" if folder.is_absolute() else f"nothing, from {Path.cwd()}",
        expected=expected,
        fix=_near(folder),
    )


def _near(folder: Path) -> str:
    """Return the advice to use the existing folder with the most similar name, or to check the path."""
    if not folder.parent.is_dir():
        return "check the path"
    names = [other.name for other in folder.parent.iterdir() if other.is_dir()]
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f"did you mean {folder.parent / near[0]}?" if near else "check the path"


def _is_downloaded(path: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, file), str)


def _ask_hub(path: str, where: str) -> None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise InputError(
            "no such folder, and nothing is downloaded while HF_HUB_OFFLINE is set",
            where=where,
            expected="a folder, or an id that was downloaded before",
            fix=f"download it first with `hf download {path}`, or name a folder",
        )
    try:
        HfApi().model_info(path, timeout=_HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        found = error.server_message or str(error).strip().splitlines()[0]
        raise InputError(
            "no such folder, and no model of that id that you may read",
            where=where,
            found=found,
            expected="a folder, or an id such as owner/name",
            fix="check the name; for a gated model log in with `hf auth login`",
        ) from None
    except Exception as error:  # without a network, the client's transport raises errors of many kinds
        raise MachineError(
            "no such folder, and the hub cannot be reached",
            where=where,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="a folder, or an id that can be downloaded",
            fix="check the path or the network",
        ) from None
