"""The students that benchmarks/train_step.py measures, which learn from shards step by step."""

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
        run_file: Path of the run file whose corpus, teacher and student are used; None for a real model as the teacher,
            and the same model with every fifth of its layers as the student.
        changes: Changes to the run file's sections.
        num_tokens: Number of tokens of the cache; the steps of all rounds and of the warm-up are one epoch of it.
        batch_sequences: Number of sequences in a step.
        precisions: Lightning's names of the precisions, which are measured one after another.
        rounds: Number of rounds that are counted.
        steps: Number of steps of every way in a round.
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
    """Return the student, its corpus, and a cache of both recordings, by a real teacher or one that is trained briefly.

    Finished stages are not made again.
    """
    given: dict[str, Any] = {"name": "train-step"}
    if size.run_file is not None:
        given = yaml.safe_load((ROOT / size.run_file).read_text())
    else:
        teacher = str(real_model(SMOLLM2))
        given |= {"teacher": {"path": teacher}, "corpus": {"tokenizer": teacher}}
    # the run trains no student, so its file need not say which of the two recordings trainings use
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
    """Keep layers that are evenly spread over the model's depth, which gives it the shape of a pruned student."""
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
        name: Name of the way; `CROSS_ENTROPY` trains without targets.
        model: The student, of which a copy is trained.
        reader: Reader of its shards.
        size: What is measured on the device.
        device: The device on which it trains.
        precision: Lightning's name of the precision.
        waited_s: Wall seconds that steps waited for their batches.
        waited_cpu_s: CPU seconds that steps waited for their batches.
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
        """Return the batches of two epochs, so that the first may end during a measurement."""
        return iter(
            SequenceLoader(self.reader, LoaderSettings(self.size.batch_sequences, 0, num_epochs=2, threads=threads))
        )

    def step(self) -> None:
        """Take one step, and add the time that it waits for its batch to `waited_s` and `waited_cpu_s`."""
        started, cpu_started = time.perf_counter(), time.process_time()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - started
        self.waited_cpu_s += time.process_time() - cpu_started
        # Lightning moves a batch to the device in this way, and computes in this context
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
        """Return the MiB of the weights and the optimizer's moments."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *(value for value in moments if isinstance(value, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
