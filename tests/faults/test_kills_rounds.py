"""kill -9 in each stage of a second round; the same command again ends in what an undisturbed run makes."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import yaml
from processes import Zygote
from round_runs import settings_of
from test_kills import SEED, result_of

STAGES = ("generate", "cache", "train")
KILLS_A_STAGE = 3


@pytest.mark.slow
def test_killed_in_any_stage_of_its_second_round_a_run_ends_alike(zygote: Zygote, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    run_file, out, chance = tmp_path / "run.yaml", Path(settings["out"]), random.Random(SEED)
    run_file.write_text(yaml.safe_dump(settings))
    first = [
        "corpus",
        "teacher",
        "generate/round-0",
        "cache/round-0",
        "student/seed-1",
        "train/distilled/seed-1/round-0",
    ]
    second = {name: f"{name}/distilled/seed-1/round-1" for name in STAGES}
    for instance in (*first, *second.values()):
        code, said = zygote.run(instance.partition("/")[0], run_file, "--instance", instance)
        assert code == 0, said
    for name, instance in second.items():
        command = (name, run_file, "--instance", instance)
        folder = out / instance
        undisturbed = result_of(folder)
        shutil.rmtree(folder)
        began = time.monotonic()
        code, said = zygote.run(*command)
        assert (code, result_of(folder)) == (0, undisturbed), said
        whole_s = time.monotonic() - began
        shutil.rmtree(folder)
        instants = [round(chance.uniform(0, whole_s), 3) for _ in range(KILLS_A_STAGE)]
        for instant in instants:
            zygote.run(*command, kill_after_s=instant)
        code, said = zygote.run(*command)
        why = f"CAPGAP_SEED={SEED}, {name}, killed after {instants} s"
        assert code == 0, f"{why}: {said}"
        assert result_of(folder) == undisturbed, why
