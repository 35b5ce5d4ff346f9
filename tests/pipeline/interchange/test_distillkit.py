"""DistillKit's captures decode to what DistillKit decodes.

The files in tests/assets/distillkit were packed by DistillKit's own code, commit a61c2e7 (Apache-2.0): rows of a table
of logits over 300 ids, in the columns and with the `compression_config.yaml` that its `sample_logits_vllm` writes.
Beside each target, `decoded_ids` and `decoded_logprobs` are what its own decoder makes of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml

from capgap.pipeline.interchange.distillkit import DistillKitTargets, decode_logprobs, id_bits, unpack_bits
from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.interchange.parquet import Layout, read_rows
from capgap.pipeline.interchange.plan import plan
from capgap.schemas.distillkit import DistillKitConfig
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.interchange import ColumnNames

ASSETS = Path(__file__).parents[2] / "assets" / "distillkit"
KINDS = sorted(folder.name for folder in ASSETS.iterdir())


def config_of(kind: str) -> DistillKitConfig:
    return DistillKitConfig.model_validate(yaml.safe_load((ASSETS / kind / "compression_config.yaml").read_text()))


def rows_of(kind: str) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(ASSETS / kind / "data_0.parquet").to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_the_one_that_distillkit_decodes(kind: str) -> None:
    config = config_of(kind)
    for row in rows_of(kind):
        ids = unpack_bits(np.array(row["bytepacked_indices"], np.uint8), id_bits(config), config.k)
        assert ids.tolist() == row["decoded_ids"]
        logprobs = decode_logprobs(np.array(row["compressed_logprobs"], np.uint8), config)
        # exact where they were decoded; elsewhere float32 products are summed in another order
        np.testing.assert_allclose(logprobs, row["decoded_logprobs"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_a_target_after_each_token_but_the_last(kind: str) -> None:
    layout = Layout(ColumnNames(), 300, DistillKitTargets(config_of(kind), 300))
    for row, expected in zip(read_rows(ASSETS / kind / "data_0.parquet", layout), rows_of(kind), strict=True):
        assert row.targets is not None and row.tokens_M.tolist() == expected["input_ids"]
        assert len(row.targets) == len(row) - 1
        # approximated logprobs may rise within a row; a target has them falling
        assert (np.diff(row.targets.logprobs_TW, axis=1) <= 0).all()
        found = [set(ids) for ids in row.targets.ids_TW.tolist()]
        assert found == [set(ids) for ids in expected["decoded_ids"]]


def test_a_folder_of_captures_becomes_a_cache(settings_for: Callable[..., Any]) -> None:
    made = import_captures(settings_for(ASSETS / "recommended", format="distillkit", profile="lossless"))
    num_labels = sum(made.corpus.manifest.totals[f"num_{split}_labels"] for split in ("student", "heldout"))
    assert num_labels == sum(len(row["input_ids"]) - 1 for row in rows_of("recommended"))
    assert made.cache.manifest.facts["recordings"]["topk"]["num_ids"] == 32
    assert made.cache.manifest.settings["import"]["compression"]["configs"][0]["exact_k"] == 4


def test_the_file_that_tells_the_packing_is_needed_and_must_be_theirs(
    tmp_path: Path, settings_for: Callable[..., Any]
) -> None:
    alone = tmp_path / "captures" / "data_0.parquet"
    alone.parent.mkdir()
    shutil.copy(ASSETS / "bins" / "data_0.parquet", alone)
    with pytest.raises(InputError, match=r"the captures' compression is not described.*--compression_config"):
        import_captures(settings_for(alone, format="distillkit"))
    other = str(ASSETS / "exact" / "compression_config.yaml")
    with pytest.raises(MismatchError, match=r"not packed as the configuration says.*expected 9"):
        import_captures(settings_for(alone, format="distillkit", compression_config=other))
    older = tmp_path / "older.yaml"
    older.write_text("k: 8\nexact_k: 4\npolynomial_degree: 2\nvocab_size: 300\n")
    with pytest.raises(InputError, match="its older one keeps no logprobs"):
        import_captures(settings_for(alone, format="distillkit", compression_config=str(older)))


def test_the_pad_token_behind_a_row_is_no_label() -> None:
    layout = Layout(ColumnNames(), 300, DistillKitTargets(config_of("exact"), 300))
    first = next(read_rows(ASSETS / "exact" / "data_0.parquet", layout))
    assert first.mask_M.all()
    padded = Layout(ColumnNames(), 300, layout.targets, end_padding=int(first.tokens_M[-1]))
    again = next(read_rows(ASSETS / "exact" / "data_0.parquet", padded))
    assert again.mask_M[:-1].all() and not again.mask_M[-1]


def test_each_file_is_decoded_by_the_config_beside_it(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], tmp_path: Path
) -> None:
    """float16 and bfloat16 are of the same width: nothing else would tell that the config is another file's."""
    written = {"bfloat16": teacher.rows[:30], "float16": teacher.rows[30:]}
    for dtype, rows in written.items():
        write([packed(row, teacher.vocab_size, dtype) for row in rows], f"{dtype}/data_0.parquet")
        config = {"d": teacher.vocab_size, "k": 8, "exact_k": 8, "exact_dtype": dtype, "residual_bins": []}
        (tmp_path / dtype / "compression_config.yaml").write_text(yaml.safe_dump(config | {"delta_encoding": False}))
    first, second = (tmp_path / dtype for dtype in written)
    own = {"format": "distillkit"}
    recorded = []
    for settings in (
        settings_for(first, second, **own),
        settings_for(second, first, **own),
        settings_for(first, heldout=(str(second),), **own),
    ):
        planned = plan(settings)
        recorded.append(planned.cache_settings["import"]["compression"])
        expected = {tuple(row["input_ids"]): row["logprobs"] for row in teacher.rows}
        rows = [row for split in ("student", "heldout") for row in planned.rows(split, with_targets=True)]
        assert len(rows) == len(expected)
        for row in rows:
            assert row.targets is not None
            # bfloat16 has 8 bits of a number
            np.testing.assert_allclose(row.targets.logprobs_TW, expected[tuple(row.tokens_M.tolist())], rtol=1 / 128)
    assert [config["exact_dtype"] for config in recorded[0]["configs"]] == ["bfloat16", "float16"]
    assert recorded[0]["config_of"] == {"student": [0, 1], "heldout": [0, 1]}
    assert recorded[2]["config_of"] == {"student": [0], "heldout": [1]}
    named = str(first / "compression_config.yaml")
    told = plan(settings_for(first, second, compression_config=named, **own)).cache_settings["import"]["compression"]
    assert [config["exact_dtype"] for config in told["configs"]] == ["bfloat16"], "the one that is named is of all"


def test_bytes_in_padding_are_not_looked_at(teacher: Any, write: Callable[..., Path]) -> None:
    rows = [packed(row, teacher.vocab_size, "float16") for row in teacher.rows[:5]]
    pads: list[tuple[Any, Any]] = [(0, []), (None, None), (7, [None, 300])]
    padded = [
        {
            "input_ids": row["input_ids"] + [token for token, _ in pads],
            "attention_mask": [1] * len(row["input_ids"]) + [0] * 3,
        }
        | {name: [*row[name], *(data for _, data in pads)] for name in ("bytepacked_indices", "compressed_logprobs")}
        for row in rows
    ]
    config = DistillKitConfig(
        d=teacher.vocab_size, k=8, exact_k=8, exact_dtype="float16", residual_bins=(), delta_encoding=False
    )
    layout = Layout(ColumnNames(), teacher.vocab_size, DistillKitTargets(config, teacher.vocab_size))
    found, plain = (list(read_rows(write(of, "of.parquet"), layout)) for of in (padded, rows))
    for row, expected in zip(found, plain, strict=True):
        assert row.targets is not None and expected.targets is not None
        assert np.array_equal(row.targets.ids_TW, expected.targets.ids_TW)
        assert np.array_equal(row.targets.logprobs_TW, expected.targets.logprobs_TW)
    broken = [row | {"bytepacked_indices": [[None, *row["bytepacked_indices"][0][1:]]]} for row in rows]
    broken = [
        row | {"input_ids": row["input_ids"][:2], "compressed_logprobs": row["compressed_logprobs"][:1]}
        for row in broken
    ]
    with pytest.raises(InputError, match=r"row 0, bytepacked_indices: not bytes; found 1 values"):
        list(read_rows(write(broken, "c.parquet"), layout))


def packed(row: dict[str, Any], vocab_size: int, dtype: str) -> dict[str, Any]:
    """A row of the table as DistillKit packs it, with exact logprobs alone."""
    num_bits = int(np.ceil(np.log2(vocab_size)))
    ids_TK = np.array(row["ids"])
    bits = (ids_TK[..., None] >> np.arange(num_bits - 1, -1, -1)) & 1
    logprobs_TK = torch.tensor(row["logprobs"]).to(getattr(torch, dtype))
    return {
        "input_ids": row["input_ids"],
        "bytepacked_indices": np.packbits(bits.reshape(len(ids_TK), -1).astype(np.uint8), axis=1).tolist(),
        "compressed_logprobs": logprobs_TK.contiguous().view(torch.uint8).tolist(),
    }
