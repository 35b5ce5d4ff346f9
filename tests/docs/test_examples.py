"""The examples of docs/examples run as they stand: on a cache and a student of a tiny run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from tiny_runs import NEEDED, settings_of
from transformers import AutoModelForCausalLM

from capgap import open_cache
from capgap.pipeline.store import ShardReader
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Of a run that has a cache and a student."""
    settings: dict[str, Any] = settings_of(tmp_path_factory.mktemp("run") / "tiny", "number")
    for instance in NEEDED:
        carry_out(RunFile.model_validate(settings), instance)
    return Path(settings["out"])


def run(name: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "look_at_a_cache",
        "plain_torch",
        "hf_trainer",
        "read_without_capgap",
        "webdataset_loader",
        "webdataset_mix",
    }


def test_an_example_without_arguments_says_how_it_is_called() -> None:
    for path in EXAMPLES.glob("*.py"):
        usage = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[-1]
        assert usage.startswith(f"python {path.name} ")
        asked = f"len(sys.argv) != {len(usage.split()) - 1}:"
        assert asked in path.read_text() and "sys.exit(__doc__)" in path.read_text(), path.name
    done = run("read_without_capgap")
    assert done.returncode == 1 and "python read_without_capgap.py CACHE" in done.stderr


def test_what_a_cache_holds_is_shown_as_text(out: Path) -> None:
    done = run("look_at_a_cache", out / "cache", out / "student" / "seed-1" / "model")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("{'sampled': 20}")
    assert sum(line.endswith("->") for line in lines) == 5
    assert any("%" in line for line in lines)


def test_a_cache_is_read_without_capgap(out: Path) -> None:
    done = run("read_without_capgap", out / "cache")
    assert done.returncode == 0, done.stderr
    *targets, count = done.stdout.splitlines()
    manifest = open_cache(out / "cache").manifest
    shards = manifest.shard_sets["sampled"]
    assert count == f"{shards.num_sequences * shards.seq_len} targets"
    sequences, drawn = ShardReader(out / "cache", shards).read(0)
    tokens_L1, num_ids_L = sequences.tokens_BL1[0], drawn.num_ids_BL[0]
    for i, line in enumerate(targets):
        part = slice(int(num_ids_L[:i].sum()), int(num_ids_L[: i + 1].sum()))
        counts = dict(sorted(zip(drawn.ids_D[part].tolist(), drawn.counts_D[part].tolist(), strict=True)))
        said, _, shown = line.partition("; sampled: ")
        assert said == f"after {tokens_L1[i]} comes {tokens_L1[i + 1]}"
        assert dict(sorted(ast.literal_eval(shown).items())) == counts


def test_a_student_learns_in_a_plain_loop_and_a_restarted_one_goes_on_to_the_same_weights(
    out: Path, tmp_path: Path
) -> None:
    given = (out / "cache", out / "student" / "seed-1" / "model")
    done = run("plain_torch", *given, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1].rstrip(",")) for line in done.stdout.splitlines() if line.startswith("loss ")]
    assert len(losses) > 1 and losses[-1] < losses[0]
    # what it saved last lies some steps before the end
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "state.pt").rename(tmp_path / "again" / "state.pt")
    assert run("plain_torch", *given, tmp_path / "again").returncode == 0
    whole, again = (weights_of(tmp_path / name / "model") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_student_learns_from_webdataset_s_loader(out: Path) -> None:
    done = run("webdataset_loader", out / "cache", out / "student" / "seed-1" / "model")
    assert done.returncode == 0, done.stderr
    *_, first, last, count = done.stdout.splitlines()
    assert float(last.split()[1]) < float(first.split()[1])
    assert count == f"{open_cache(out / 'cache').manifest.shard_sets['sampled'].num_sequences} sequences"


def test_a_cache_is_mixed_with_another_webdataset(out: Path, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "other.tar")) as tar:
        for number in range(7):
            tar.write({"__key__": f"{number}", "txt": f"line {number}"})
    done = run("webdataset_mix", out / "cache", tmp_path / "other.tar")
    assert done.returncode == 0, done.stderr
    shards = open_cache(out / "cache").manifest.shard_sets["sampled"]
    assert ast.literal_eval(done.stdout) == {"sequences": shards.num_sequences, "texts": 7}


def test_a_student_learns_under_hugging_face_s_trainer(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    given = out / "student" / "seed-1" / "model"
    done = run("hf_trainer", out / "cache", given, tmp_path)
    assert done.returncode == 0, done.stderr
    steps_per_epoch = open_cache(out / "cache").batches(8).steps_per_epoch
    assert f"TrainOutput(global_step={3 * steps_per_epoch}," in done.stdout and "'train_loss'" in done.stdout
    before, after = weights_of(given), weights_of(tmp_path)
    assert any(not torch.equal(before[name], after[name]) for name in before)
