"""Settings of the cache stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_endpoint import EndpointSettings

Profile = Literal["lossless", "near-lossless", "compact", "small"]
"""How exactly `topk` logprobs are stored."""


OPERATIONAL_ENGINE_ARGS = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_eplb",
        "enable_expert_parallel",
        "enforce_eager",
        "kv_cache_memory_bytes",
        "load_format",
        "long_prefill_token_threshold",
        "master_addr",
        "master_port",
        "max_cudagraph_capture_size",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "nnodes",
        "node_rank",
        "num_gpu_blocks_override",
        "optimization_level",
        "pipeline_parallel_size",
        "safetensors_load_strategy",
        "use_tqdm_on_load",
    }
)
"""The arguments of vLLM that change only speed, memory and at most the rounding of logprobs."""

RecordingName = Literal["sampled", "topk", "chunks"]
"""How a distribution is stored, which is also the name of its shard set in a cache. `align` makes `chunks`."""


class CacheSettings(Record):
    """How the teacher's distribution after every token is computed and stored."""

    engine: Literal["vllm", "transformers", "server"] = "vllm"
    """What runs the teacher. `vllm` is fast. `transformers` is a slow reference that needs no vLLM. `server` asks an
    endpoint with `prompt_logprobs`, such as `vllm serve`, for the model `teacher.served`, with `recording: topk` and
    temperature 1 only."""

    server: EndpointSettings = Field(default_factory=EndpointSettings, json_schema_extra=OPERATIONAL)
    """Address of the server, for `engine: server`. A cache does not depend on which server runs the teacher."""

    recording: Literal["sampled", "topk", "both"] = "sampled"
    """Which form of the distributions is stored. `sampled`: ids and counts of systematic samples, an unbiased target
    for forward KL at one temperature. `topk`: the top-k tokens and the tail, which reverse KL, JSD and other
    temperatures need. `both`: the two side by side from one pass of the teacher; `train.recording` then picks one."""

    num_samples: int | None = Field(None, ge=1, le=65535)
    """Samples stored after each token, for `sampled`. More are more exact and take more disk. Left out, 50."""

    top_k: int | None = Field(None, ge=1, le=65535)
    """Most probable tokens stored after each token, for `topk`. More take more disk. Left out, 64."""

    profile: Profile | None = None
    """How exactly logprobs are stored, for `topk`, which decides the cache's size on disk. `lossless`: 32 bits.
    `near-lossless`: steps of 1/64 nat. `compact`: 165 steps, finest for probable tokens. `small`: like `compact`, but
    only the tokens that together hold 99 % of the probability. Left out, `near-lossless`."""

    temperature: float = Field(1.0, gt=0)
    """Temperature by which the teacher's logits are divided before they are stored. Students train at it too."""

    extra_temperatures: tuple[float, ...] = ()
    """Further temperatures at which students can train, for `topk`. The tail is stored for each of them."""

    seed: int = Field(0, ge=0)
    """Seed of the samples. Each offset is a pure function of seed, sequence and position."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the teacher's weights and activations; `auto` is the dtype of its checkpoint. The head always computes
    in float32."""

    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many targets, at the end of a shard. Left out, the student's whole split is scored."""

    num_heldout_sequences: int = Field(64, ge=0)
    """Held-out sequences that are scored too, rounded up to whole blocks of at most 8192 targets, so that a training
    can measure its distance from the teacher on text that it does not train on."""

    chunk_rows: int = Field(1024, ge=1, json_schema_extra=OPERATIONAL)
    """Rows of logits held at once. On a GPU they take at most `chunk_rows` x vocabulary x 18 bytes, or 26 bytes with
    `tensor_parallel` above 1. A GPU is refused if `gpu_memory_fraction` leaves less than that; lower this number
    then."""

    batch_tokens: int = Field(8192, ge=16, json_schema_extra=OPERATIONAL)
    """Tokens that the engine processes at once. Fewer take less memory."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of a GPU's memory that vLLM may take. The rest must hold `chunk_rows` rows of logits."""

    tensor_parallel: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Number of devices over which vLLM spreads one teacher that is too large for one. Logprobs are equal up to
    rounding, so that it does not decide which cache is made."""

    capture: Literal["auto", "worker", "public"] = Field("auto", json_schema_extra=OPERATIONAL)
    """How distributions leave vLLM. `worker`: reduced on the device, where the logits are. `public`: through vLLM's own
    logprobs, which is slower and only for `topk` at temperature 1. `auto`: `worker`, or `public` with a warning if this
    version of vLLM is not supported. Logprobs are equal up to rounding; the manifest says which way was used."""

    engine_args: Annotated[dict[str, JsonValue], PATH] = Field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, for example `quantization`, `kv_cache_dtype`, `enable_expert_parallel`,
    `pipeline_parallel_size`, `hf_overrides`, `revision`, `enforce_eager`. They override capgap's own values. Arguments
    that would make logprobs inexact, or that capgap has a setting for, are refused. Those that change only speed and
    memory do not decide which cache is made; all others do."""

    replicas: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Engines that score shards at the same time, each on its own GPUs, started by Ray on this machine or on the
    cluster that RAY_ADDRESS names. A shard is the same whichever replica makes it."""

    cross_check: Literal["auto", "never"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Compare vLLM's logprobs with those of transformers, which eval and pruning use for the teacher, before the first
    shard. `auto`: if the teacher fits on the device in float32. transformers loads it in float32 and then in the
    cache's dtype, for four sequences of 4096 tokens together, or one sequence of at most 8192."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine != "vllm":
            own = {"tensor_parallel": 1, "capture": "auto", "engine_args": {}}
            for name in (name for name, left_out in own.items() if getattr(self, name) != left_out):
                raise ValueError(f"cache.{name}: found with engine {self.engine}, expected vllm")
        if self.engine == "server":
            self._require_served()
        stages = self.engine_args.get("pipeline_parallel_size", 1)
        if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
            raise ValueError(f"cache.engine_args.pipeline_parallel_size: found {stages!r}, expected 1 or more")
        if self.recording == "topk" and self.num_samples is not None:
            raise ValueError("cache.num_samples: found with recording topk, expected sampled; use cache.top_k")
        if self.recording == "sampled" and self.top_k is not None:
            raise ValueError("cache.top_k: found with recording sampled, expected topk; use cache.num_samples")
        if self.recording == "sampled" and self.profile is not None:
            raise ValueError("cache.profile: found with recording sampled, expected topk; counts are always exact")
        if self.recording == "sampled" and self.extra_temperatures:
            raise ValueError(
                "cache.extra_temperatures: found with recording sampled, expected topk; samples have one temperature"
            )
        every = (self.temperature, *self.extra_temperatures)
        if len(set(every)) < len(every) or not all(0 < temperature < float("inf") for temperature in every):
            raise ValueError(
                f"cache.extra_temperatures: found {list(self.extra_temperatures)}, expected numbers above 0, none "
                f"twice, and not {self.temperature:g}, which is cache.temperature"
            )
        return self

    def _require_served(self) -> None:
        """Raise ValueError for a setting that a server does not support or that the server decides itself."""
        if self.recording != "topk":
            raise ValueError(
                f"cache.recording: found {self.recording} with engine server, expected topk; a server gives the top-k "
                "tokens and no whole distribution to sample from"
            )
        if self.temperature != 1 or self.extra_temperatures:
            name = "temperature" if self.temperature != 1 else "extra_temperatures"
            raise ValueError(f"cache.{name}: found with engine server, expected temperature 1 alone, a server's own")
        if self.dtype != "auto":
            raise ValueError("cache.dtype: found with engine server, expected it in the server's own command")
        if self.replicas > 1:
            raise ValueError(
                f"cache.replicas: found {self.replicas} with engine server, expected 1; raise cache.server.num_parallel"
            )

    @property
    def recordings(self) -> tuple[RecordingName, ...]:
        """The recordings that are stored: `sampled`, `topk` or both."""
        return ("sampled", "topk") if self.recording == "both" else (self.recording,)

    def num_ids(self, recording: RecordingName) -> int:
        """Return the samples (`sampled`) or ids (`topk`) stored per token; 0 for a recording that is not stored."""
        if recording not in self.recordings:
            return 0
        if recording == "sampled":
            return self.num_samples if self.num_samples is not None else 50
        return self.top_k if self.top_k is not None else 64

    @property
    def stored_profile(self) -> Profile | None:
        """The profile of `topk`, with its default; None if `topk` is not stored."""
        return None if "topk" not in self.recordings else self.profile or "near-lossless"

    @property
    def num_devices(self) -> int:
        """Number of devices of one engine; 0 if a server runs the teacher."""
        if self.engine == "server":
            return 0
        stages = self.engine_args.get("pipeline_parallel_size", 1)
        assert isinstance(stages, int)
        return self.tensor_parallel * stages

    @property
    def sorted_temperatures(self) -> tuple[float, ...]:
        """The values of `extra_temperatures` in ascending order."""
        return tuple(sorted(self.extra_temperatures))

    def meant(self) -> dict[str, Any]:
        """Return numbers of ids and profile with their defaults, and those `engine_args` that change the result."""
        return {
            "num_samples": self.num_ids("sampled") or None,
            "top_k": self.num_ids("topk") or None,
            "profile": self.stored_profile,
            "extra_temperatures": list(self.sorted_temperatures),
            "engine_args": {
                name: value for name, value in self.engine_args.items() if name not in OPERATIONAL_ENGINE_ARGS
            },
        }
