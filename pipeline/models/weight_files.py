"""Names, shapes and dtypes of a model's tensors, read from the headers of its weight files alone.

    model.safetensors                                 8 bytes: length of the header | header, JSON | the tensors' bytes
    model.safetensors.index.json --names--> model-00001-of-00002.safetensors, model-00002-of-00002.safetensors

If a file is something else, such as a Git LFS pointer or an incomplete download, the error says so.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from capgap.pipeline.models.contents import first_line
from capgap.pipeline.models.hub import not_there, require_reached
from capgap.pipeline.store.pointers import require_no_pointer
from capgap.schemas.errors import InputError

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_COMPARED_ROWS = 4096
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# weight files that people have instead of safetensors, and the fix for each
_OTHERS = {
    ".bin": "convert the pickled weights: load them with transformers where you trust them, and save them again",
    ".pt": "convert the pickled weights to safetensors with the names of transformers",
    ".pth": "convert the pickled weights to safetensors with the names of transformers",
    ".gguf": "load the GGUF file with transformers' gguf_file, and save the model again",
}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as described in a file's header.

    Attributes:
        shape: sizes of the tensor's dimensions.
        dtype: dtype in the notation of safetensors, for example `BF16`.
    """

    shape: tuple[int, ...]
    dtype: str


def read_headers(path: str) -> dict[str, TensorHeader]:
    """Read the header of each tensor of a model, by name, without reading any weights.

    Args:
        path: the model's folder or id; for an id only the headers are fetched.

    Raises:
        InputError: a file is missing, a Git LFS pointer, cut off or damaged, or there are no safetensors files.
        MachineError: the network fails.
    """
    folder = Path(path) if Path(path).is_dir() else _downloaded(path)
    return _of_hub(path) if folder is None else _of_folder(folder, path)


def are_equal(path: str, one: str, other: str) -> bool:
    """Return whether two tensors of a model have equal values; True where the weights are not on this machine.

    Raises:
        InputError, MachineError: as `read_headers`.
    """
    folder = Path(path) if Path(path).is_dir() else _downloaded(path)
    if folder is None:
        return True
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in _files(folder, path)]
        first, second = (
            next(file.get_slice(name) for file in opened if name in file.keys())  # noqa: SIM118  # no mapping
            for name in (one, other)
        )
        size = first.get_shape()[0]
        parts = (slice(start, start + _COMPARED_ROWS) for start in range(0, size, _COMPARED_ROWS))
        return first.get_shape() == second.get_shape() and all(torch.equal(first[part], second[part]) for part in parts)


def _downloaded(path: str) -> Path | None:
    """Return the local folder of an id's weights, or None where they would be downloaded again.

    Damaged files in that folder are found by its reader.
    """
    found = try_to_load_from_cache(path, "config.json", revision=_revision(path))
    folder = Path(found).parent if isinstance(found, str) else None
    if constants.HF_HUB_OFFLINE and folder is None:
        raise not_there("no model can be found", path, OSError("not downloaded"), "config.json")
    if folder is None or constants.HF_HUB_OFFLINE or (folder / WHOLE_NAME).exists():
        return folder
    return folder if (folder / INDEX_NAME).exists() and not _missing(folder) else None


def _revision(path: str) -> str | None:
    """Return the newest commit of an id on the hub; None in offline mode."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().model_info(path).sha
    except (OSError, HfHubHTTPError) as error:
        require_reached(path, error)
        raise not_there("no model can be found", path, error, WHOLE_NAME) from None


def _missing(folder: Path) -> bool:
    try:
        _shards(folder, str(folder))
    except InputError:
        return True
    return False


def _of_folder(folder: Path, where: str) -> dict[str, TensorHeader]:
    files = _files(folder, where)
    headers: dict[str, TensorHeader] = {}
    homes: dict[str, str] = {}
    for file in files:
        for name, header in _of_file(file, where).items():
            if name in headers:
                raise InputError(
                    "a tensor lies in two files",
                    where=where,
                    found=f"{name} in {homes[name]} and {file.name}",
                    expected="each tensor in one file",
                    fix="download the model again into an empty folder, or save it anew",
                )
            headers[name], homes[name] = header, file.name
    return headers


def _files(folder: Path, where: str) -> list[Path]:
    if (folder / WHOLE_NAME).exists():
        return [folder / WHOLE_NAME]
    if (folder / INDEX_NAME).exists():
        return _shards(folder, where)
    raise _no_weights(folder, where)


def _shards(folder: Path, where: str) -> list[Path]:
    index = folder / INDEX_NAME
    require_no_pointer(index, where)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError("a file outside of the model's folder")
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise InputError(
            "the index of the weights cannot be read",
            where=where,
            found=f"{INDEX_NAME} without a readable weight_map",
            fix="download that file again",
        ) from None
    if missing or not files:
        raise InputError(
            "files of weights are missing",
            where=where,
            found=f"{len(files) - len(missing)} of the {len(files)} that {INDEX_NAME} names",
            expected=_some(missing) or "one or more",
            fix="download what is missing",
        )
    return files


def _of_file(file: Path, where: str) -> dict[str, TensorHeader]:
    require_no_pointer(file, where)
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return {name: TensorHeader(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            "the file is not a complete safetensors file",
            where=where,
            found=_fault(file) or f"{file.name}: {first_line(error)}",
            fix="download that file again",
        ) from None


def _fault(file: Path) -> str | None:
    """Return what is wrong with a file that cannot be opened, if its length or its first bytes show it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size >= 8 and 8 + length <= size:
            try:
                entries = json.loads(opened.read(length))
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
                whole = 8 + length + max(ends, default=0)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                return None
            if size == whole:
                return None
            return f"{file.name} {'ends too early' if size < whole else 'goes on too long'}: {size} bytes, of {whole}"
        opened.seek(0)
        beginning = opened.read(24)
    if beginning[:1] in (b"<", b"{"):
        return f"{file.name} begins with {beginning.decode(errors='replace')!a}, a page or text"
    return f"{file.name} ends too early: {size} bytes, which is not even its header"


def _no_weights(folder: Path, where: str) -> InputError:
    gone = sorted(file.name for file in folder.iterdir() if file.is_symlink() and not file.exists())
    if gone:
        return InputError(
            "files of weights are missing",
            where=where,
            found=f"{_some(gone)}, links to files that no longer exist",
            expected="files",
            fix="download the model again",
        )
    return no_weights([file.name for file in folder.iterdir() if file.is_file()], where)


def no_weights(names: list[str], where: str) -> InputError:
    """Return the error for a model that has only the files `names`, none of which is a safetensors file to load."""
    fix: str | None
    if "adapter_config.json" in names:
        found, fix = "an adapter of PEFT without its model", "merge it into its model (merge_and_unload) and save that"
    else:
        others = sorted(name for name in names if Path(name).suffix in _OTHERS and name != "training_args.bin")
        strange = sorted(name for name in names if name.endswith(".safetensors"))
        found = f"only {_some(others or strange)}" if others or strange else "no weights"
        fix = _OTHERS[Path(others[0]).suffix] if others else None
        if any(_SHARD.fullmatch(name) for name in strange):
            fix = f"download {INDEX_NAME} too"
    return InputError(
        "no weights as safetensors", where=where, found=found, expected=f"{WHOLE_NAME} or {INDEX_NAME}", fix=fix
    )


def no_config(names: list[str], where: str) -> InputError:
    """Return the error for a model that has only the files `names`, without a config.json."""
    told = no_weights(names, where)
    return InputError(
        "there is no model",
        where=where,
        found=f"no config.json, and {told.found}",
        expected="a Hugging Face folder with config.json",
        fix=told.fix,
    )


def _of_hub(path: str) -> dict[str, TensorHeader]:
    try:
        files = HfApi().get_safetensors_metadata(path).files_metadata
    except NotASafetensorsRepoError:
        raise no_weights(HfApi().list_repo_files(path), path) from None
    except SafetensorsParsingError as error:
        raise InputError("the file is not a complete safetensors file", where=path, found=first_line(error)) from None
    except (OSError, HfHubHTTPError) as error:
        require_reached(path, error)
        raise not_there("no model can be found", path, error, WHOLE_NAME) from None
    tensors: dict[str, Any] = {name: one for file in files.values() for name, one in file.tensors.items()}
    return {name: TensorHeader(tuple(one.shape), str(one.dtype)) for name, one in tensors.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
