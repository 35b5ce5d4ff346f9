"""Settings of the cache stage."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from capgap.schemas.base import OPERATIONAL, Record
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
"""Of vLLM's arguments those that change speed and memory, and of a row at most the rounding."""

RecordingName = Literal["sampled", "topk", "chunks"]
"""How a distribution is kept; the name of a shard set of the cache. `chunks`: as `align` makes them."""


class CacheSettings(Record):
    """How the teacher's distribution after every token is kept."""

    engine: Literal["vllm", "transformers", "server"] = "vllm"
    """What runs the teacher. `transformers` is the slow reference. `server`: an endpoint with `prompt_logprobs`, as
    `vllm serve` is one, which knows the teacher as `teacher.served`; for `topk` at temperature 1."""

    server: EndpointSettings = Field(default_factory=EndpointSettings, json_schema_extra=OPERATIONAL)
    """Where the teacher is served, for engine `server`. Whoever serves the same model makes the same cache."""

    recording: Literal["sampled", "topk", "both"] = "sampled"
    """`sampled` keeps ids and counts of systematic samples, an unbiased target. `topk` keeps the top-k tokens and the
    tail. `both` keeps them side by side from one pass of the teacher; a training takes one, `train.recording`."""

    num_samples: int | None = Field(None, ge=1, le=65535)
    """Samples a token, for `sampled`; 50 where it is left out."""

    top_k: int | None = Field(None, ge=1, le=65535)
    """Tokens kept after each token, for `topk`; 64 where it is left out."""

    profile: Profile | None = None
    """How exactly logprobs are stored, for `topk`; `near-lossless` where it is left out. `lossless`: 32 bits.
    `near-lossless`: steps of 1/64 nat. `compact`: 165 steps, finest for likely ids. `small`: as `compact`, and of each
    token only the ids that hold 99 % of the probability."""

    temperature: float = Field(1.0, gt=0)
    """The teacher's logits are divided by this before they are kept; students train at the same temperature."""

    extra_temperatures: tuple[float, ...] = ()
    """Further temperatures at which students can train, for `topk`: the tail is kept at each of them too."""

    seed: int = Field(0, ge=0)
    """Seed of the samples. Each offset is a pure function of seed, sequence and position."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The teacher's weights and activations, `auto` as they were saved; the head is computed in float32 in any case."""

    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many targets, whole shards. Leave it out to score everything the student may see."""

    num_heldout_sequences: int = Field(64, ge=0)
    """Held-out sequences that are scored beside, rounded up to whole blocks of at most 8192 targets, so that a training
    can measure how near it comes to the teacher on text that it does not see."""

    chunk_rows: int = Field(1024, ge=1, json_schema_extra=OPERATIONAL)
    """Rows of logits held at once: on a GPU memory is at most `chunk_rows` x vocabulary x 18 bytes, 26 with
    `tensor_parallel`. A GPU that has less left beside `gpu_memory_fraction` is refused."""

    batch_tokens: int = Field(8192, ge=16, json_schema_extra=OPERATIONAL)
    """Tokens that the engine schedules at once."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of a GPU's memory that vLLM may claim; what is left over holds the logits of a chunk."""

    tensor_parallel: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Devices that vLLM spreads one teacher over. Sums are taken in another order, as with other batches: rows come
    out equal up to rounding, so this is no other cache."""

    capture: Literal["auto", "worker", "public"] = Field("auto", json_schema_extra=OPERATIONAL)
    """How rows leave vLLM. `worker`: reduced beside the logits. `public`: vLLM's own logprobs, slower, and for `topk`
    at temperature 1 only. `auto`: `public`, with a warning, where this vLLM is not known to the capture. Rows come out
    equal up to rounding, so this is no other cache; its manifest names the way beside the engine."""

    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs` by their names there, for example `quantization`, `kv_cache_dtype`,
    `enable_expert_parallel`, `pipeline_parallel_size`, `hf_overrides`, `revision`, `enforce_eager`. They win over
    capgap's own choice. What would break exactness, and what capgap has a setting for, is refused by name. Those that
    change speed and memory alone decide nothing about the cache; all others do."""

    replicas: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Engines that score shards at once, each on GPUs of its own, by Ray: on this machine, or on the cluster that
    RAY_ADDRESS names. Which replica makes a shard changes nothing in it."""

    cross_check: Literal["auto", "never"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Hold vLLM against transformers, through which eval and pruning look at the teacher, before the first shard.
    `auto`: where the teacher fits on the device in float32. It is loaded there in float32 and in the cache's dtype, one
    after the other, for four sequences and 4096 tokens, or one sequence of at most 8192."""

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
        """Raise ValueError for what a server cannot give, or decides by itself."""
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
        """What is kept, by name."""
        return ("sampled", "topk") if self.recording == "both" else (self.recording,)

    def num_ids(self, recording: RecordingName) -> int:
        """Samples a token (`sampled`) or ids kept a token (`topk`); 0 for a recording that is not made."""
        if recording not in self.recordings:
            return 0
        if recording == "sampled":
            return self.num_samples if self.num_samples is not None else 50
        return self.top_k if self.top_k is not None else 64

    @property
    def stored_profile(self) -> Profile | None:
        """The profile of `topk`, None without it."""
        return None if "topk" not in self.recordings else self.profile or "near-lossless"

    @property
    def num_devices(self) -> int:
        """Devices that one engine takes; none where the teacher is served elsewhere."""
        if self.engine == "server":
            return 0
        stages = self.engine_args.get("pipeline_parallel_size", 1)
        assert isinstance(stages, int)
        return self.tensor_parallel * stages

    @property
    def sorted_temperatures(self) -> tuple[float, ...]:
        """The further temperatures, rising."""
        return tuple(sorted(self.extra_temperatures))

    def meant(self) -> dict[str, Any]:
        """Numbers of ids and the profile where they were left out; what only changes speed decides nothing."""
        return {
            "num_samples": self.num_ids("sampled") or None,
            "top_k": self.num_ids("topk") or None,
            "profile": self.stored_profile,
            "extra_temperatures": list(self.sorted_temperatures),
            "engine_args": {
                name: value for name, value in self.engine_args.items() if name not in OPERATIONAL_ENGINE_ARGS
            },
        }
