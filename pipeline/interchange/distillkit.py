"""DistillKit's captures: ids packed into bits, and logprobs as exact values, a fit, and the residual of the fit.

A target's bytes, one part after the other:

    exact_k values         each of exact_dtype
    coefficients           each of term_dtype, one for each polynomial term
    each residual bin      its scale, and its elements in element_bits each, the highest bit first

Every value that is not exact is fit + residual. With delta_encoding every value is the difference from the one before.
Target i is the teacher's distribution after token i, and the last token has none. Rounding follows DistillKit's own,
step by step, so that each logprob equals DistillKit's; the layout is that of its commit a61c2e7.

Legend: T targets of a row, K = k ids, E exact values, P terms, D bytes of a target, M tokens of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import yaml
from pydantic import ValidationError

from capgap.pipeline.interchange.captures import MOST_OVER_ONE_APPROXIMATED, RowTargets, checked_targets
from capgap.pipeline.interchange.parquet import targets_of
from capgap.pipeline.interchange.ragged import Ragged, fits, lists_of
from capgap.schemas.distillkit import DistillKitConfig
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.records import FloatArray, IntArray

CONFIG_NAME = "compression_config.yaml"
LOGPROBS, IDS = "compressed_logprobs", "bytepacked_indices"

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
Bytes = npt.NDArray[np.uint8]


def read_config(settings: ImportSettings, capture: Path) -> DistillKitConfig:
    """Read the file that says how captures are packed: the one in the settings, or the one beside the captures.

    Raises:
        InputError: The file does not exist, or is not such a file.
    """
    path = capture.parent / CONFIG_NAME if settings.compression_config is None else Path(settings.compression_config)
    try:
        return DistillKitConfig.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            "the captures' compression is not described",
            where=path,
            found=str(error).strip().splitlines()[0],
            expected=f"DistillKit's {CONFIG_NAME}",
            fix="name it with --compression_config",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            "no configuration of DistillKit's compression",
            where=path,
            found=f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}",
            expected="the fields d, k, exact_k and so on of its present format; its older one keeps no logprobs",
        ) from None


class DistillKitTargets:
    """A reader of targets from DistillKit's columns.

    Args:
        config: Description of how the targets are packed.
        vocab_size: Size of the vocabulary; every id must be smaller.
    """

    required: tuple[str, ...] = (IDS, LOGPROBS)
    optional: tuple[str, ...] = ()

    def __init__(self, config: DistillKitConfig, vocab_size: int) -> None:
        self._config, self._vocab_size = config, vocab_size
        self._ids: Any = None
        self._logprobs: Any = None

    def open(self, batch: pa.RecordBatch, where: str) -> None:
        """Take the columns of a batch of rows."""
        self._ids = lists_of(batch.column(IDS), 2, np.uint8, f"{where}, {IDS}")
        self._logprobs = lists_of(batch.column(LOGPROBS), 2, np.uint8, f"{where}, {LOGPROBS}")

    def row(self, number: int, tokens_M: IntArray, keep: slice, where: str) -> RowTargets:
        """Return the targets of a row's tokens that are not padding."""
        config = self._config
        ids, logprobs = self._ids.row(number), self._logprobs.row(number)
        if len(ids) != len(logprobs):
            raise InputError("not as many logprobs as ids", where=where, found=len(logprobs), expected=len(ids))
        part = targets_of(keep, len(ids), len(tokens_M), where)
        ids, logprobs = (of.lists(part.start, part.stop) for of in (ids, logprobs))
        ids_TD = _rectangle(ids, -(-config.k * id_bits(config) // 8), f"{where}, {IDS}")
        logprobs_TD = _rectangle(logprobs, num_logprob_bytes(config), f"{where}, {LOGPROBS}")
        logprobs_TK = decode_logprobs(logprobs_TD, config)
        ids_TK = unpack_bits(ids_TD, id_bits(config), config.k).astype(np.int32)
        return checked_targets(
            tokens_M[keep], ids_TK, logprobs_TK, None, None, self._vocab_size, where, MOST_OVER_ONE_APPROXIMATED
        )


def id_bits(config: DistillKitConfig) -> int:
    """Return the number of bits of an id, computed in float32 as DistillKit computes it."""
    return int(np.ceil(np.log2(np.float32(config.d))))


def num_logprob_bytes(config: DistillKitConfig) -> int:
    """Return the number of bytes of a target's logprobs."""
    num = config.exact_k * _size(config.exact_dtype) + len(config.polynomial_terms or ()) * _size(config.term_dtype)
    return num + sum(_size(of.scale_dtype) + -(-of.num_elements * of.element_bits // 8) for of in config.residual_bins)


def decode_logprobs(data_TD: Bytes, config: DistillKitConfig) -> FloatArray:
    """Return the logprobs [T, K] of packed targets, in nats, float32."""
    rest = torch.from_numpy(np.ascontiguousarray(data_TD))
    out = _DTYPES[config.exact_dtype]
    exact_TE, rest = _take(rest, config.exact_k, config.exact_dtype)
    num_approximated = config.k - config.exact_k
    coefficients_TP, rest = _take(rest, len(config.polynomial_terms or ()), config.term_dtype)
    residuals = []
    for of in config.residual_bins:
        scale_T1, rest = _take(rest, 1, of.scale_dtype)
        num_bytes = -(-of.num_elements * of.element_bits // 8)
        codes = unpack_bits(rest[:, :num_bytes].numpy(), of.element_bits, of.num_elements)
        rest = rest[:, num_bytes:]
        residuals.append(_dequantised(torch.from_numpy(codes), of.element_bits) * scale_T1)
    residual = torch.zeros(len(data_TD), num_approximated, dtype=out)
    if residuals:
        known = torch.cat(residuals, dim=1)
        residual = torch.nn.functional.pad(known, (0, num_approximated - known.shape[1]))
    values = residual.to(out)
    if config.polynomial_terms:
        terms = _terms(config, num_approximated).to(coefficients_TP.dtype)
        values = (terms * coefficients_TP[:, None]).sum(dim=-1) + values
    values = torch.cat([exact_TE.to(out), values], dim=1)
    if config.delta_encoding:
        values = values.float().cumsum(dim=1).to(out)
    logprobs: FloatArray = values.float().numpy()
    return logprobs


def unpack_bits(data_TD: Bytes, num_bits: int, num_values: int) -> npt.NDArray[np.int64]:
    """Return numbers [T, num_values] that are packed in `num_bits` bits each, the highest bit first."""
    bits = np.unpackbits(np.ascontiguousarray(data_TD), axis=1)[:, : num_bits * num_values]
    weights = 1 << np.arange(num_bits - 1, -1, -1, dtype=np.int64)
    found: npt.NDArray[np.int64] = bits.reshape(len(data_TD), num_values, num_bits) @ weights
    return found


def _dequantised(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    if num_bits == 1:
        return codes.float() * 2 - 1
    return (codes - (1 << num_bits - 1)).float()


def _terms(config: DistillKitConfig, num: int) -> torch.Tensor:
    """Return the value of each polynomial term at each approximated logprob [K - E, P]."""
    dtype = _DTYPES[config.term_dtype]
    at = torch.linspace(0, 1, num, dtype=dtype) if config.normalize_t else torch.arange(num, dtype=dtype)
    terms: list[torch.Tensor] = []
    for term in config.polynomial_terms or ():
        terms.append(at.sqrt() if term == "sqrt" else at.exp() if term == "exp" else at**term)
    return torch.stack(terms, dim=-1)


def _take(data: torch.Tensor, num_values: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `num_values` values of each row, and the bytes after them."""
    size = num_values * _size(dtype)
    # copied, because a view as another dtype must begin at an address that suits that dtype
    part = data[:, :size].clone(memory_format=torch.contiguous_format)
    values = part.view(_DTYPES[dtype]) if num_values else part.new_empty((len(data), 0), dtype=_DTYPES[dtype])
    return values, data[:, size:]


def _size(dtype: str) -> int:
    return _DTYPES[dtype].itemsize


def _rectangle(lists: Ragged, width: int, where: str) -> Bytes:
    if len(lists) and (lists.sizes_R != width).any():
        raise MismatchError(
            "not packed as the configuration says",
            where=where,
            found=f"{lists.sizes_R.min()} to {lists.sizes_R.max()} bytes a target",
            expected=width,
            fix=f"name the {CONFIG_NAME} that these captures were made with",
        )
    is_byte_D = fits(lists.values, np.uint8)
    if not is_byte_D.all():
        raise InputError(
            "not bytes", where=where, found=f"{int((~is_byte_D).sum())} values", expected="0 to 255, and no null"
        )
    values: Bytes = lists.values.astype(np.uint8, copy=False).reshape(len(lists), width)
    return values
