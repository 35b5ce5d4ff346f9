"""Which architectures can be cached, and how much the logprobs of vLLM and transformers differ for each.

python benchmarks/architectures.py                  every architecture that is not in the results yet, then the table
python benchmarks/architectures.py --only NAME ...  these architectures, even if they are in the results
python benchmarks/architectures.py --page FILE      put the table into a page, between its marks

Each architecture is a float32 model with seeded random weights; noise is added to its norms and biases, which would
otherwise be all ones or zeros. The model is a given teacher of a run's own stages, which make two lossless caches of
the same sequences: one by vLLM, captured on the worker, and one by transformers. Each architecture has a process of its
own, so that even a crash becomes a line of the results. Lines with the installed versions are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from architecture_configs import NAMES, NUM_COLUMNS, SEQ_LEN, VOCAB_SIZE, config_of
from architectures_page import fill_page, table
from machine import RESULTS, machine, slug_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store import ShardReader
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CapgapError, InputError
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import TopkTargets
from capgap.schemas.run_file import RunFile

NUM_TARGETS, TOP_K = 2048, 16
_MOST_S = 900
_VECTOR_NOISE = 0.1

Row = dict[str, Any]


def main() -> None:
    """Measure the architectures that the results lack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        default=None,
        metavar="NAME",
        help="measure these, even if they are in the results",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/architectures"), help="folder of the corpus and the models"
    )
    parser.add_argument(
        "--results", type=Path, help="file of the results; default: in benchmarks/results, named after the machine"
    )
    parser.add_argument("--page", type=Path, help="measure nothing, and write the table of the results into this page")
    flags = parser.parse_args()
    path = flags.results or RESULTS / f"architectures-{slug_of(machine('cpu')['device'])}.jsonl"
    if flags.page:
        fill_page(flags.page, read_rows(path))
        return
    import vllm  # noqa: F401  imported before the rows' processes are forked, so that they need not import it

    os.environ.setdefault("CAPGAP_LEASE_DIR", str((flags.work / "leases").resolve()))
    make_corpus(flags.work)
    for name in flags.only or NAMES:
        rows = {row["name"]: row for row in read_rows(path)}
        if flags.only or rows.get(name, {}).get("versions") != versions():
            rows[name] = row_of(name, flags.work)
            write_rows(path, [rows[one] for one in NAMES if one in rows])
            print(f"{time.strftime('%H:%M:%S')} {name}: {rows[name]}", flush=True)
    print(table(read_rows(path)))


def read_rows(path: Path) -> list[Row]:
    """Return the results that are there; a line that a killed process left unfinished is ignored."""
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()] if path.is_file() else []


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write all rows atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".half")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a row."""
    from vllm import __version__ as vllm_version  # the package has one name on a GPU and another on a CPU

    return {"vllm": vllm_version, "transformers": version("transformers"), "torch": torch.__version__}


def row_of(name: str, work: Path) -> Row:
    """Measure one architecture in a process of its own; `fault` says in words why there are no figures."""
    started = time.monotonic()
    # forked: importing torch and vLLM takes longer than most rows
    forks = multiprocessing.get_context("fork")
    answers, answer = forks.Pipe(duplex=False)
    process = forks.Process(target=lambda: answer.send(compared(name, work)))
    process.start()
    answer.close()
    found: Row = {"fault": f"not finished after {_MOST_S} s"}
    if answers.poll(_MOST_S):
        try:
            found = answers.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            found = {"fault": f"its process was ended by {signal.Signals(-code).name}" if code < 0 else "it failed"}
    process.kill()
    process.join()
    about = {"versions": versions(), "machine": machine("cpu"), "wall_s": round(time.monotonic() - started, 1)}
    return {"name": name} | found | about


def make_corpus(work: Path) -> Manifest:
    """Make a corpus of the English documentation that Python carries, with a vocabulary of 300 ids."""
    texts = [topics[name] for name in sorted(topics)[:24]]
    if not (work / "tokenizer").exists():
        (work / "text").mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            (work / "text" / f"{number:02d}.txt").write_text(text)
        train_tokenizer(texts, VOCAB_SIZE).save_pretrained(work / "tokenizer")
    return carry_out(RunFile.model_validate(_corpus_run(work)), Instance("corpus"))


def _corpus_run(work: Path) -> dict[str, Any]:
    return {
        "name": "architectures",
        "out": str(work / "shared"),
        "device": "cpu",
        "corpus": {
            "sources": [str(work / "text")],
            "tokenizer": str(work / "tokenizer"),
            "seq_len": SEQ_LEN,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
            "shard_sequences": 16,
        },
    }


def compared(name: str, work: Path) -> Row:
    """Return the figures of one architecture, or the fault that prevented them."""
    folder = work / "models" / name.lower().replace(" ", "-").replace(",", "").replace(".", "-")
    shutil.rmtree(folder, ignore_errors=True)
    row = _save(name, folder / "given", work / "tokenizer")
    try:
        caches = {engine: _cache(engine, folder, work) for engine in ("transformers", "vllm")}
    except Exception as error:  # any error becomes the row's fault
        said = str(error) if isinstance(error, CapgapError) else repr(error)
        return row | {"fault": said.replace(str(folder / "given"), "the teacher")[:300]}
    row |= _apart(*(_targets(*made) for made in caches.values()))
    row["engine"] = caches["vllm"][1].facts["engines"][0]  # type: ignore[index,call-overload]
    row["refuses_incomplete"] = _refuses_incomplete(folder / "given")
    shutil.rmtree(folder)
    return row


def _save(name: str, folder: Path, tokenizer: Path) -> Row:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * _VECTOR_NOISE)
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return {"class": type(model).__name__, "num_parameters": sum(one.numel() for one in model.parameters())}


def _cache(engine: str, folder: Path, work: Path) -> tuple[Path, Manifest]:
    """Make teacher and cache of a run over the shared corpus, and return the cache's folder and manifest."""
    run = RunFile.model_validate(
        _corpus_run(work)
        | {
            "out": str(folder / engine),
            "reuse": {"corpus": str(work / "shared" / "corpus")},
            "teacher": {"path": str(folder / "given")},
            "cache": {
                "engine": engine,
                "recording": "topk",
                "top_k": TOP_K,
                "profile": "lossless",
                "max_tokens": NUM_TARGETS,
                "num_heldout_sequences": 0,
                **({"capture": "worker"} if engine == "vllm" else {}),
            },
        }
    )
    teacher = carry_out(run, Instance("teacher"))
    assert teacher.facts["padded_vocab_size"] == NUM_COLUMNS
    return folder / engine / "cache", carry_out(run, Instance("cache"))


def _targets(folder: Path, manifest: Manifest) -> TopkTargets:
    """Return all targets of a cache as one block."""
    reader = ShardReader(folder, manifest.shard_sets["topk"])
    blocks = [reader.read(index)[1] for index in range(reader.shard_set.num_members)]
    fields = [name for name in vars(blocks[0])]
    return TopkTargets(*(np.concatenate([getattr(block, name) for block in blocks]) for name in fields))


def _apart(reference: TopkTargets, found: TopkTargets) -> Row:
    assert max(int(targets.ids_BLK.max()) for targets in (reference, found)) < VOCAB_SIZE
    labels = found.label_logprobs_BL.astype(np.float64) - reference.label_logprobs_BL
    return {
        "num_labels": labels.size,
        "label_loss": -float(reference.label_logprobs_BL.mean(dtype=np.float64)),
        "rms_nats": float(np.sqrt((labels**2).mean())),
        "max_nats": float(np.abs(labels).max()),
        "same_top": float((reference.ids_BLK[..., 0] == found.ids_BLK[..., 0]).mean()),
    }


def _refuses_incomplete(folder: Path) -> bool:
    """Return whether the model is refused after a matrix of its last layer is removed from its file."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    matrices = [name for name, weight in weights.items() if weight.ndim > 1 and ".3." in name]
    del weights[matrices[-1]]
    save_file(weights, file, {"format": "pt"})
    try:
        require_complete(str(folder))
    except InputError:
        return True
    return False


if __name__ == "__main__":
    main()
