"""`capgap init`: writes a new run file, with a comment at each line that the user fills in."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from capgap.jobs.arguments import Parser, one_of, parse
from capgap.jobs.logs import log
from capgap.schemas.errors import InputError, SettingError

_HEAD = """\
# {about}
# `capgap plan {file}` estimates the cost, `capgap run {file}` makes it, and `capgap status {file}` shows the state.
# `capgap run --help all` lists every setting. A setting that is left out has its default.
name: {name}
{out:<36}  # this folder receives one folder for each stage
device: auto                          # a GPU if there is one; or cpu, or cuda
"""

_TEXT = """\
corpus:
  sources: ["data/*.jsonl"]           # files, folders or globs: .jsonl .jsonl.zst .parquet .txt .md
  text_field: text                    # field of a record that holds the text; for conversations, `messages_field`
  tokenizer: Qwen/Qwen2.5-0.5B        # a Hugging Face id or folder; teacher and students must share it
  seq_len: 1024                       # length of a sequence in tokens
  teacher_fraction: 0.0               # share of the documents that trains a teacher: none, as it is given
  heldout_fraction: 0.01              # share of the documents that no model trains on, to measure on
"""

_TEACHER = """\
teacher:
  path: Qwen/Qwen2.5-1.5B             # a Hugging Face id or folder
cache:
  engine: vllm                        # or transformers, which is slower, if vLLM is not installed
  recording: sampled                  # unbiased samples; or topk, the most probable tokens; or both
  num_samples: 50                     # samples stored for each token
  # max_tokens: 10_000_000            # stop after this many tokens; left out, the whole text is scored
"""

_REUSE = """\
reuse:
  cache: runs/shards/cache            # a finished cache: a folder, or a URL such as s3://bucket/shards/cache
"""

_STUDENT = """\
student:
  path: Qwen/Qwen2.5-0.5B             # or model: {hidden_size: 512, ...} for fresh weights, or prune: {...}
train:
  learning_rate: 1.0e-4               # peak learning rate
  batch_sequences: 32                 # sequences in an optimizer step
  micro_batch_sequences: 4            # sequences in a forward pass; lower it if memory runs out
  num_epochs: 1
  precision: bf16-mixed               # on a CPU, 32-true
"""

_ARMS = """\
arms:                                 # variants of `train`, which all see the same sequences
  distilled: {alpha: 1.0}             # learns from the teacher alone
  cross_entropy: {alpha: 0.0}         # learns from the text alone, for comparison
seeds: [0]                            # one student is trained for each arm and seed
"""

_EVAL = """\
eval:
  num_sequences: 512                  # held-out sequences that every model is measured on
"""

USES = {
    "all": ("text and a teacher in, a student and a report out", _TEXT + _TEACHER + _STUDENT + _ARMS + _EVAL),
    "shards": ("the teacher's distributions over a corpus, as shards for any number of students", _TEXT + _TEACHER),
    "train": ("students from a finished cache; no teacher and no corpus are needed", _REUSE + _STUDENT + _EVAL),
}
"""The uses that a run file can be written for, each with a description and its sections."""


def init_command(argv: Sequence[str]) -> int:
    """Run `capgap init`: write a run file. An existing file is never overwritten."""
    flags = parse(init_parser(), argv)
    name = str(flags["name"]).removesuffix(".yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SettingError(
            "cannot be the name of a run", where="NAME", found=name, expected="letters, digits, - _ and ."
        )
    path = Path(f"{name}.yaml")
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
            file.write(run_file_text(name, flags["use"]))
    except FileExistsError:
        raise InputError("is there already", where=path, fix="give another NAME, as in `capgap init NAME`") from None
    log("run_file_written", f"{path}: fill in its lines, then `capgap plan {path}`", path=str(path))
    return 0


def init_parser() -> Parser:
    """Return the parser of `capgap init`."""
    parser = Parser("capgap init", "Write a commented run file into this folder.")
    parser.add_argument("name", metavar="NAME", nargs="?", default="run", help="Name of run and file; default run.")
    parser.add_argument(
        "--use",
        type=one_of(*USES),
        default="all",
        help="all (default): from text to a report; shards: make a cache alone; train: train from a finished cache.",
    )
    return parser


def run_file_text(name: str, use: str) -> str:
    """Return the text of a run file for one of `USES`."""
    about, sections = USES[use]
    out = f"out: runs/{name}"
    return _HEAD.format(about=f"{about[0].upper()}{about[1:]}.", file=f"{name}.yaml", name=name, out=out) + sections
