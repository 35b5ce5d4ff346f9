"""Trainings in real processes: as many as a job has ranks, killed where it says so; imports are made once.

    python ranks_program.py JOBS.json

A job: folder, student, shards, settings, ranks, and `kill_at`: a step at which all of its ranks are killed, or null.
Each rank writes which sequences it has read at which step, `read-RANK.jsonl`; the first one the weights, `weights`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from capgap.pipeline.stage.ranks import Ranks, Rendezvous, ranks_in_environment
from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_optimization import OptimizationSettings


def train(job: dict[str, Any]) -> None:
    folder, ranks = Path(job["folder"]), ranks_in_environment() or Ranks()
    readers = [ShardReader(Path(path), ShardSet.model_validate_json(text)) for path, text in job["shards"]]
    settings = OptimizationSettings.model_validate(job["settings"])
    task = TrainingTask("train", settings, *readers, 1.0, 1.0, 0, "cpu", folder, ranks=ranks)
    _write_down_what_is_read(folder / f"read-{ranks.rank}.jsonl", job)
    model = LlamaForCausalLM.from_pretrained(job["student"])
    if ranks.world_size == 1:
        totals = fit(model, task)
    else:
        with Rendezvous(ranks, "train").group("cpu"):
            totals = fit(model, task)
    if ranks.is_first:
        (folder / "totals.json").write_text(json.dumps(totals))
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "weights")


def _write_down_what_is_read(path: Path, job: dict[str, Any]) -> None:
    original = DistillationModule.training_step

    def training_step(self: DistillationModule, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        row = {"job": job["number"], "step": self.trainer.global_step, "rows": batch.input_ids_BL.tolist()}
        row |= {"loss": float(self.last.loss), "labels": int((batch.labels_BL >= 0).sum())}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if job["kill_at"] is not None and self.trainer.global_step >= job["kill_at"] + 2:
            signal.pause()  # it is killed soon, however busy the machine
        return loss

    DistillationModule.training_step = training_step


def start(job: dict[str, Any]) -> list[int]:
    """Process ids of the job's ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if not child:
            size = str(job["ranks"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                train(job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def last_step(folder: Path) -> int:
    try:
        return json.loads((folder / "read-0.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def run(job: dict[str, Any]) -> None:
    children = start(job)
    if job["kill_at"] is not None:
        while last_step(Path(job["folder"])) < job["kill_at"]:
            if any(os.waitpid(child, os.WNOHANG)[0] for child in children):
                sys.exit("the training ended before it could be killed")
            time.sleep(0.002)
        for child in children:
            os.kill(child, signal.SIGKILL)
    expected = 0 if job["kill_at"] is None else signal.SIGKILL
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert ends == [expected] * len(children), (job["folder"], ends)


if __name__ == "__main__":
    for number, each in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        run(each | {"number": number})
