"""kill -9 at random instants; the same command again ends in what an undisturbed run makes, bit for bit.

`CAPGAP_KILLS` says how many kills there are over all stages, `CAPGAP_SEED` repeats the instants of an earlier run as
far as the machine's speed allows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Zygote

NUM_KILLS = int(os.environ.get("CAPGAP_KILLS", "40"))
SEED = int(os.environ.get("CAPGAP_SEED", random.SystemRandom().getrandbits(32)))

# Kills of one run. What is not taken up where it was killed would else hardly ever come to its end.
KILLS_A_RUN = 5

# What a stage reads, and its share of the kills.
INPUTS = {
    "corpus": (),
    "teacher": ("corpus",),
    "cache": ("corpus", "teacher"),
    "student": ("corpus", "teacher", "cache"),
    "train": ("corpus", "teacher", "cache", "student"),
    "eval": ("corpus", "teacher", "cache", "student", "train"),
}
SHARES = {"corpus": 0.2, "teacher": 0.1, "cache": 0.3, "student": 0.1, "train": 0.2, "eval": 0.1}
FOLDERS = {"student": "student/seed-0", "train": "train/distilled/seed-0"}


def result_of(folder: Path) -> dict[str, Any]:
    """What must be alike: every file of the result but the log of times, and what the manifest says of shards."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: manifest[key] for key in ("identity", "content", "shard_sets", "facts", "totals")}


@pytest.mark.parametrize("stage", INPUTS)
def test_killed_at_random_instants_a_stage_ends_in_what_an_undisturbed_one_makes(
    zygote: Zygote, made: Path, run_file: Path, tmp_path: Path, stage: str
) -> None:
    chance = random.Random(f"{SEED} {stage}")
    instance = FOLDERS.get(stage, stage)
    folder = tmp_path / "out" / instance
    command = (stage, run_file, "--out", tmp_path / "out")

    def begin_anew() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for name in INPUTS[stage]:
            shutil.copytree(made / name, tmp_path / "out" / name)

    begin_anew()
    began = time.monotonic()
    code, said = zygote.run(*command)
    whole_s = time.monotonic() - began
    assert code == 0, said
    undisturbed = result_of(folder)
    # of eval there is none yet
    assert undisturbed == result_of(made / instance if stage != "eval" else folder), "two undisturbed runs differ"

    num_kills = num_runs = 0
    while num_kills < round(NUM_KILLS * SHARES[stage]):
        begin_anew()
        instants: list[float] = []
        code = -9
        while code == -9 and len(instants) < KILLS_A_RUN:
            instants.append(round(chance.uniform(0, whole_s), 3))
            code, said = zygote.run(*command, kill_after_s=instants[-1])
            num_kills += code == -9
        if code == -9:
            code, said = zygote.run(*command)
        why = f"CAPGAP_SEED={SEED}, run {num_runs} of {stage}, killed after {instants} s"
        assert code == 0, f"{why}: {said}"
        assert result_of(folder) == undisturbed, f"{why}: {sorted(map(str, folder.rglob('*')))}"
        assert list(folder.rglob("*.partial-*")) == [], why
        num_runs += 1
    print(f"{stage}: {num_kills} kills in {num_runs} runs, {whole_s:.2f} s undisturbed, seed {SEED}")
