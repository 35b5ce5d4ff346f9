"""`capgap init`: a run file of one's own, with a comment at each line that is to be filled in."""

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
# `capgap plan {file}` says what it will cost, `capgap run {file}` makes it, `capgap status {file}` how it stands.
# `capgap run --help all` lists every setting; what is left out has its default.
name: {name}
{out:<36}  # one folder for each stage
device: auto                          # a GPU where there is one; or cpu, cuda
"""

_TEXT = """\
corpus:
  sources: ["data/*.jsonl"]           # files, folders or globs: .jsonl .jsonl.zst .parquet .txt .md
  text_field: text                    # the field that holds the text; `messages_field` for conversations
  tokenizer: Qwen/Qwen2.5-0.5B        # a Hugging Face id or folder; teacher and students must share it
  seq_len: 1024                       # tokens that are learnt from in a sequence
  teacher_fraction: 0.0               # the teacher is given: no text is kept back to train one
  heldout_fraction: 0.01              # share of the documents that is only measured
"""

_TEACHER = """\
teacher:
  path: Qwen/Qwen2.5-1.5B             # a Hugging Face id or folder
cache:
  engine: vllm                        # transformers where vLLM is not installed: slower, the same rows
  recording: sampled                  # unbiased samples; topk for the most probable tokens, or both
  num_samples: 50                     # samples a token
  # max_tokens: 10_000_000            # stop after so many; all of the text where it is left out
"""

_REUSE = """\
reuse:
  cache: runs/shards/cache            # a finished cache: a folder, or a URL such as s3://bucket/shards/cache
"""

_STUDENT = """\
student:
  path: Qwen/Qwen2.5-0.5B             # or model: {hidden_size: 512, ...} for fresh weights, or prune: {...}
train:
  learning_rate: 1.0e-4               # its peak
  batch_sequences: 32                 # sequences in a step
  micro_batch_sequences: 4            # of these, how many at once: less memory
  num_epochs: 1
  precision: bf16-mixed               # 32-true on a CPU
"""

_ARMS = """\
arms:                                 # each is `train` with its own settings, on the same sequences
  distilled: {alpha: 1.0}             # learns from the teacher alone
  cross_entropy: {alpha: 0.0}         # learns from the text alone, to compare
seeds: [0]                            # a student for each arm and seed
"""

_EVAL = """\
eval:
  num_sequences: 512                  # held-out sequences that every model is measured on
"""

USES = {
    "all": ("text and a teacher in, a student and a report out", _TEXT + _TEACHER + _STUDENT + _ARMS + _EVAL),
    "shards": ("the teacher's distributions over a corpus, as shards for any number of students", _TEXT + _TEACHER),
    "train": ("students from shards that are there; no teacher and no corpus are needed", _REUSE + _STUDENT + _EVAL),
}
"""What a run file can be written for: what it does, and its sections."""


def init_command(argv: Sequence[str]) -> int:
    """`capgap init`: write a run file; never over another."""
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
    """The parser of `capgap init`."""
    parser = Parser("capgap init", "Write a commented run file into this folder.")
    parser.add_argument("name", metavar="NAME", nargs="?", default="run", help="Name of the run and its file; run.")
    parser.add_argument(
        "--use",
        type=one_of(*USES),
        default="all",
        help="all, from text to a report, by default; shards, to generate them; train, to train from a finished cache.",
    )
    return parser


def run_file_text(name: str, use: str) -> str:
    """A run file for that use."""
    about, sections = USES[use]
    out = f"out: runs/{name}"
    return _HEAD.format(about=f"{about[0].upper()}{about[1:]}.", file=f"{name}.yaml", name=name, out=out) + sections
