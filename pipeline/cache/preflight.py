"""Checks of the cache's engine that are possible before any stage of a run begins."""

from __future__ import annotations

import importlib.util

from capgap.pipeline.stage.ray_cluster import require_ray
from capgap.pipeline.store.extras import adding
from capgap.schemas.errors import MachineError
from capgap.schemas.run_file import RunFile


def require_engine(run: RunFile) -> None:
    """Refuse an engine whose package is not installed, or whose server does not answer.

    Raises:
        MachineError: vLLM is not installed, or Ray for several replicas, or the teacher's server cannot be reached.
        SettingError: an argument of `cache.engine_args` is not allowed, or the server does not serve the teacher.
    """
    if run.cache.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        # imported here because it brings torch
        from capgap.pipeline.cache.vllm_start import require_vllm

        require_vllm()
    if run.cache.engine == "server":
        _require_server(run)
    if run.cache.engine_args:
        # imported here because importing vLLM takes seconds
        from capgap.pipeline.cache.engine_args import require_engine_args
        from capgap.pipeline.cache.vllm_start import set_environment

        set_environment(run.device, run.cache.num_devices)
        require_engine_args(run.cache.engine_args)
    require_ray("cache.replicas", run.cache.replicas)


def _require_server(run: RunFile) -> None:
    if importlib.util.find_spec("openai") is None:
        raise MachineError(
            "the client of endpoints, openai, is not installed",
            where="cache.engine",
            found=run.cache.engine,
            fix=f"run {adding('served')}",
        )
    if run.makes("teacher") and run.teacher.served is not None:
        from capgap.pipeline.cache.server_engine import endpoint_of, require_served

        with endpoint_of(run.cache.server, run.teacher.served) as endpoint:
            require_served(endpoint, run.cache.server, run.corpus.seq_len)
