"""What benchmarks/train_step.py measures: students that learn from shards, step by step."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
import yaml
from real_models import SMOLLM2, real_model
from transformers import PreTrainedModel

from capgap.pipeline.models.checks import fresh_model
from capgap.pipeline.models.load import load_model
from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings

ROOT = Path(__file__).parents[1]
CROSS_ENTROPY = "cross-entropy alone"
NUM_SAMPLES, NUM_KEPT = 50, 64
THREADS = 2  # the loader's own default


@dataclass(frozen=True)
class Size:
    """What is measured on a device.

    Attributes:
        run_file: whose corpus, teacher and student are taken; None takes a real model for teacher, and for student the
            same with every fourth or fifth of its layers.
        changes: to it.
        num_tokens: of the cache: the steps of all rounds, and of one to warm up, are an epoch of it.
        batch_sequences: of a step.
        precisions: Lightning's names, measured one after the other.
        rounds: each takes `steps` steps of every way.
        steps: see `rounds`.
    """

    run_file: str | None
    changes: dict[str, Any]
    num_tokens: int
    batch_sequences: int
    precisions: tuple[str, ...]
    rounds: int
    steps: int


_REAL_LAYERS = 6
_REAL = {
    "corpus": {
        "sources": ["builtin:python"],
        "seq_len": 256,
        "teacher_fraction": 0.0,
        "heldout_fraction": 0.02,
        "shard_sequences": 64,
    },
    "cache": {"batch_tokens": 1028, "num_heldout_sequences": 0},
}
_SHORT_TEACHER = {"teacher": {"training": {"learning_rate": 3e-3, "batch_sequences": 4, "max_tokens": 200_000}}}
SIZES = {
    "real": Size(None, _REAL, 24_576, 2, ("32-true", "bf16-mixed"), 9, 2),
    "toy": Size("jobs/runs/demo.yaml", _SHORT_TEACHER, 196_608, 4, ("32-true",), 11, 16),
    "cuda": Size(
        "jobs/runs/demo.yaml",
        _SHORT_TEACHER
        | {
            "corpus": {"vocab_size": 32_000},
            "student": {
                "model": {
                    "hidden_size": 2048,
                    "num_layers": 16,
                    "num_heads": 32,
                    "num_key_value_heads": 8,
                    "intermediate_size": 8192,
                }
            },
        },
        524_288,
        32,
        ("bf16-mixed",),
        5,
        10,
    ),
    "smoke": Size("tests/assets/tiny.yaml", {}, 4096, 4, ("32-true", "bf16-mixed"), 2, 2),
}


def make_cache(size: Size, work: Path, device: str) -> tuple[PreTrainedModel, StageInput, StageInput]:
    """The student, its corpus, and a cache of both recordings: by a real teacher, or one that has learnt for a minute.

    What is made is not made again.
    """
    given: dict[str, Any] = {"name": "train-step"}
    if size.run_file is not None:
        given = yaml.safe_load((ROOT / size.run_file).read_text())
    else:
        teacher = str(real_model(SMOLLM2))
        given |= {"teacher": {"path": teacher}, "corpus": {"tokenizer": teacher}}
    # no student is trained by the run, so that it need not say from which of the two recordings
    given = {name: value for name, value in given.items() if name not in ("train", "arms", "eval")}
    for name, changes in size.changes.items():
        given[name] = given.get(name, {}) | changes
    cache = {"engine": "transformers", "recording": "both", "num_samples": NUM_SAMPLES, "top_k": NUM_KEPT}
    cache |= size.changes.get("cache", {}) | {"max_tokens": size.num_tokens}
    run = RunFile.model_validate(given | {"out": str(work), "device": device, "cache": cache})
    made = {
        stage: StageInput(work / stage, carry_out(run, Instance(stage))) for stage in ("corpus", "teacher", "cache")
    }
    if run.student is not None and run.student.model is not None:
        student = fresh_model(run.student.model, made["corpus"], 0)
    else:
        student = _fewer_layers(load_model(real_model(SMOLLM2), "cpu", torch.float32), _REAL_LAYERS)
    return student.train(), made["corpus"], made["cache"]


def _fewer_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """The model with layers evenly spread over its depth: the shape of a pruned student, and weights near it."""
    layers = model.get_decoder().layers
    kept = [layers[number * len(layers) // num_layers] for number in range(num_layers)]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.get_decoder().layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = num_layers
    return model


@dataclass
class Way:
    """One student in training.

    Attributes:
        name: of the way.
        model: is copied.
        reader: of its shards; without targets it learns by cross-entropy alone.
        size: what is measured on that device.
        device: where it trains.
        precision: Lightning's name.
    """

    name: str
    model: Any
    reader: ShardReader
    size: Size
    device: str
    precision: str
    waited_s: float = field(default=0.0, init=False)
    waited_cpu_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).to(self.device)
        settings = OptimizationSettings()
        alpha = 0.0 if self.name == CROSS_ENTROPY else 1.0
        num_steps = 10 * self.size.rounds * self.size.steps
        self._module = DistillationModule(self.model, settings, num_steps, alpha, 1.0, self.reader.codec.vocab_size)
        made = self._module.configure_optimizers()
        self._optimizer, self._schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.batches = self.loader(0 if self.device == "cpu" else THREADS)

    def loader(self, threads: int) -> Iterator[Batch]:
        """An epoch's batches; another one follows where it ends."""
        return iter(
            SequenceLoader(self.reader, LoaderSettings(self.size.batch_sequences, 0, num_epochs=2, threads=threads))
        )

    def step(self) -> None:
        """One step, the time for its batch counted by itself too."""
        started, cpu_started = time.perf_counter(), time.process_time()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - started
        self.waited_cpu_s += time.process_time() - cpu_started
        # Lightning hands a batch over in this way, and computes in this context
        batch = batch.to(self.device)
        mixed = self.precision == "bf16-mixed"
        with torch.autocast(self.device, dtype=torch.bfloat16) if mixed else nullcontext():
            loss = self._module.training_step(batch, 0)
        loss.backward()
        self._module.configure_gradient_clipping(self._optimizer)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def standing_mb(self) -> float:
        """Weights and the optimizer's moments."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *(value for value in moments if isinstance(value, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
