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
import yaml

from capgap.pipeline.interchange.distillkit import DistillKitTargets, decode_logprobs, id_bits, unpack_bits
from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.interchange.parquet import Layout, read_rows
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
    assert made.cache.manifest.settings["import"]["compression"]["exact_k"] == 4


def test_the_file_that_tells_the_packing_is_needed_and_must_be_theirs(
    tmp_path: Path, settings_for: Callable[..., Any]
) -> None:
    alone = tmp_path / "captures" / "data_0.parquet"
    alone.parent.mkdir()
    shutil.copy(ASSETS / "bins" / "data_0.parquet", alone)
    with pytest.raises(InputError, match=r"the captures' compression is not told.*--compression_config"):
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
