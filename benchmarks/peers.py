"""Train students with DistillKit from its own captures, to compare with benchmarks/quality.py: a line of results each.

python benchmarks/peers.py --distillkit ~/DistillKit --python ~/DistillKit/.venv/bin/python

The teacher, the untrained student, the tokens, their order and the optimizer's settings are those of
benchmarks/quality.py --run smol, whose work folder is read. Compression, capture, loss and training are DistillKit's
own (benchmarks/distillkit_run.py names the exceptions). The capture runs in this environment, which has vLLM; the
training runs with `--python`, from an environment with DistillKit's dependencies. A finished training is a line and is
not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from machine import RESULTS, machine
from quality import Bench, Heldout, begun_bench
from quality_arms import CROSS_ENTROPY, RUNS, arms
from quality_page import kl_of
from result_lines import Results
from safetensors.torch import load_file

from capgap.pipeline.store import LoaderSettings, SequenceLoader

_POLYNOMIAL = {"polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], "exact_k": 16, "k": 128}
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "recommended (k = 128)": _POLYNOMIAL,
    "budget (k = 50)": {"polynomial_terms": [0, 1, "sqrt"], "exact_k": 1, "k": 50},
}
_ALIKE = {"exact_dtype": "bfloat16", "term_dtype": "float32", "residual_bins": [], "delta_encoding": False}
# By name: the compression, and how DistillKit's loss treats the probability outside the kept tokens (`zero` by
# default).
ARMS = {
    f"DistillKit, {name}, {missing}": (name, missing)
    for missing in ("zero", "symmetric_uniform")
    for name in COMPRESSIONS
}


def main() -> None:
    """Run the captures and trainings that the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--distillkit", type=Path, required=True, help="folder of a checkout of DistillKit")
    parser.add_argument("--python", default=sys.executable, help="a Python with DistillKit's dependencies")
    parser.add_argument("--run", choices=list(RUNS), default="smol", help="the run whose models and text are used")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="work folder of benchmarks/quality.py, whose caches are used")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the lines")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    bench = begun_bench(flags.work, flags.run, flags.smoke)
    peer = DistillKit(bench, flags.distillkit.resolve(), flags.python, bench.work.resolve() / "distillkit")
    about = bench.about | {"distillkit": peer.commit}
    results = Results(flags.results / f"peers-{flags.run}.jsonl")
    with bench.teacher_on_heldout() as heldout:
        for seed in range(flags.seeds):
            for arm in flags.arms:
                if not results.has(arm, seed, about):
                    results.add(peer.train(arm, seed, heldout) | {"about": about, "machine": machine("cpu")})
                    print(arm, seed, kl_of(results.lines[-1]), results.lines[-1], flush=True)


class DistillKit:
    """Runs a checkout of DistillKit on the models and rows of a bench.

    Attributes:
        commit: Short commit hash of the checkout.
    """

    def __init__(self, bench: Bench, checkout: Path, python: str, work: Path) -> None:
        command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        self._bench, self._checkout, self._python, self._work = bench, checkout, python, work
        # every arm reads the same sequences, so the reader of any arm gives the text
        self._reader = bench.reader(next(arm for arm in arms() if arm.name == CROSS_ENTROPY))
        self._length = self._reader.shard_set.seq_len

    def train(self, arm: str, seed: int, heldout: Heldout) -> dict[str, Any]:
        """Train one student, and return its line of the results without `about` and `machine`."""
        name, missing = ARMS[arm]
        captures, captured = self._captures(name)
        rows = self._rows(seed)
        folder = self._work / f"train-{name.split()[0]}-{missing}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        self._start(self._python, "pack", captures=captures, length=self._length, rows=rows, out=folder / "data")
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(self._training(seed, folder, captures, missing)))
        trained = self._start(self._python, "train", config=config)
        model = self._bench.student(seed)
        model.load_state_dict(_weights(folder / "student"), strict=False)  # tied weights are stored once
        num_rows = self._settings().max_tokens // self._length
        shutil.rmtree(folder)
        return (
            {"arm": arm, "seed": seed}
            | self._bench.measured(arm, model, heldout)
            | {
                "bytes_per_token": round(captured["num_bytes"] / (num_rows * self._length), 2),
                "ids_per_token": float(COMPRESSIONS[name]["k"]),
                "capture": captured,
                **trained,
            }
        )

    def _captures(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder of a capture, which is made if it is missing, with its bytes and seconds."""
        folder = self._work / f"captures-{name.split()[0]}"
        kept = folder / "taken.json"
        if not kept.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            config = folder / "asked.yaml"
            # the capture replaces d by the size of its vocabulary
            config.write_text(yaml.safe_dump(COMPRESSIONS[name] | _ALIKE | {"d": 1}))
            teacher = self._bench.teacher_folder
            found = self._start(
                sys.executable, "capture", rows=self._rows(0), model=teacher, config=config, out=folder,
                length=self._length,
            )  # fmt: skip
            kept.write_text(json.dumps(found))
        return folder, json.loads(kept.read_text())

    def _rows(self, seed: int) -> Path:
        """Write the sequences of one seed's training, in its order, each with its last label; return the file."""
        settings = self._settings()
        path = self._work / f"rows-{seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        loader = SequenceLoader(
            self._reader, LoaderSettings(settings.batch_sequences, seed, max_tokens=settings.max_tokens)
        )
        rows = [
            [*tokens_L.tolist(), int(labels_L[-1])]
            for batch in loader
            for tokens_L, labels_L in zip(batch.input_ids_BL, batch.labels_BL, strict=True)
        ]
        assert all(row[-1] >= 0 for row in rows), "labels that do not count are no rows of DistillKit's"
        pq.write_table(pa.table({"input_ids": rows}), path)
        return path

    def _training(self, seed: int, folder: Path, captures: Path, missing: str) -> dict[str, Any]:
        """Return DistillKit's run file, with the optimizer's settings of the bench."""
        settings = self._settings()
        num_steps = settings.max_tokens // self._length // settings.batch_sequences
        return {
            "model": str(self._student(seed, folder / "before")),
            "output_path": str(folder / "student"),
            "sequence_length": self._length,
            "use_flash_attention": False,
            "model_kwargs": {"torch_dtype": "float32"},
            "dataset": {"train_dataset": {"disk_path": str(folder / "data")}, "prepacked": True, "seed": None},
            "teacher": {
                "kind": "dataset",
                "logprob_compressor": yaml.safe_load((captures / "compression_config.yaml").read_text()),
            },
            "loss_functions": [
                {"function": "kl", "weight": 1.0, "temperature": 1.0, "missing_probability_handling": missing}
            ],
            "training_args": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": settings.batch_sequences,
                "learning_rate": settings.learning_rate,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": settings.final_learning_rate_ratio},
                "warmup_steps": round(settings.warmup_fraction * num_steps),
                "weight_decay": settings.weight_decay,
                "adam_beta2": 0.95,
                "optim": "adamw_torch_fused",
                "max_grad_norm": settings.clip_norm,
                "bf16": settings.precision != "32-true",
                "use_cpu": True,
                "gradient_checkpointing": False,
                "remove_unused_columns": False,
                "save_strategy": "no",
                "report_to": "none",
                "logging_steps": 10,
                "seed": seed,
            },
        }

    def _student(self, seed: int, folder: Path) -> Path:
        """Write the untrained student with the teacher's tokenizer, for releases of transformers before 5."""
        self._bench.student(seed).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= config.pop("rope_parameters", {})
        (folder / "config.json").write_text(json.dumps(config))
        teacher = Path(self._bench.teacher_folder)
        shutil.copy(teacher / "tokenizer.json", folder)
        config = json.loads((teacher / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    def _start(self, python: str, what: str, **flags: object) -> dict[str, Any]:
        """Run a command of benchmarks/distillkit_run.py, and return the JSON that it prints last."""
        script = Path(__file__).with_name("distillkit_run.py")
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [python, str(script), what, "--distillkit", str(self._checkout), *words]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _settings(self) -> Any:
        return self._bench.settings


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}


if __name__ == "__main__":
    main()
