"""kill -9 while a student of few bits is trained, and while it is packed: the same command ends in the same bits."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Zygote, is_alive, kill
from test_kills import FOLDERS, SEED, result_of

pytestmark = pytest.mark.slow

QUANTIZE = [{"format": "mxfp4", "head": True}, {"format": "int4", "group_size": 32, "head": True, "embedding": True}]
# Where the folder of the stage stands in the middle of packing.
WHILE_PACKING = ("high_precision", "high_precision/model.safetensors", "model", "model/config.json")


@pytest.mark.parametrize("quantize", QUANTIZE, ids=lambda quantize: quantize["format"])
def test_a_student_of_few_bits_ends_alike_wherever_it_was_killed(
    zygote: Zygote, made: Path, settings: dict[str, Any], tmp_path: Path, quantize: dict[str, Any]
) -> None:
    run_file, out, chance = tmp_path / "run.json", tmp_path / "out", random.Random(SEED)
    run_file.write_text(json.dumps(settings | {"student": settings["student"] | {"quantize": quantize}}))
    for name in ("corpus", "teacher", "cache"):
        shutil.copytree(made / name, out / name)
    for stage in ("student", "train"):
        command, folder = (stage, run_file, "--out", out), out / FOLDERS[stage]
        began = time.monotonic()
        code, said = zygote.run(*command)
        assert code == 0, said
        undisturbed, whole_s, num_killed = result_of(folder), time.monotonic() - began, 0
        for moment in (None, *WHILE_PACKING):
            shutil.rmtree(folder)
            if moment is None:
                for instant in (round(chance.uniform(0.3, 1) * whole_s, 3) for _ in range(2)):
                    zygote.run(*command, kill_after_s=instant)
            else:
                num_killed += _killed_as_soon_as(zygote, command, (folder / moment).exists)
            code, said = zygote.run(*command)
            why = f"CAPGAP_SEED={SEED}, {stage}, killed at {moment or 'random instants'}"
            assert code == 0, f"{why}: {said}"
            assert result_of(folder) == undisturbed, why
        assert num_killed, "no process was killed while it packed"


def _killed_as_soon_as(zygote: Zygote, command: tuple[Any, ...], there: Callable[[], bool]) -> bool:
    pid = zygote.start(*command)
    while not there() and is_alive(pid):
        time.sleep(0.0005)
    kill(pid)
    return zygote.end()[0] == -9
