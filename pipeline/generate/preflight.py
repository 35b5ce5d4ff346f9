"""Checks the settings of the rounds before anything of a run is made."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from capgap.pipeline.generate.prompts import read_prompts, split_prompts
from capgap.pipeline.stage.ray_cluster import require_ray
from capgap.pipeline.stage.rounds import rounds_of
from capgap.schemas.errors import SettingError
from capgap.schemas.manifest import MANIFEST_NAME
from capgap.schemas.run_file import RunFile


def require_writable(run: RunFile) -> None:
    """Refuse prompts that cannot be read or split, an engine that is not installed, and a folder of another run.

    Raises:
        InputError: a file of prompts is missing, a line is no prompt, or no prompt is held out or left to learn from.
        MachineError: vLLM is set as the engine and not installed, or Ray is needed for several replicas and not there.
        SettingError: the folder holds a run without rounds.
    """
    rounds = rounds_of(run)
    split_prompts(read_prompts(rounds.prompts), rounds, 0)
    if rounds.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        # imported here: it imports torch
        from capgap.pipeline.cache.vllm_start import require_vllm

        require_vllm("rounds.engine")
    require_ray("rounds.replicas", rounds.replicas)
    if (Path(run.out) / "cache" / MANIFEST_NAME).is_file():
        raise SettingError(
            "the folder holds a run without rounds",
            where="out",
            found=f"{run.out}/cache/{MANIFEST_NAME}",
            expected="a folder of its own, because the caches of the rounds would lie within that cache",
            fix="choose another `out`",
        )
