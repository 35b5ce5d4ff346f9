"""The smallest runs with rounds: a given teacher of fresh weights, a student of fresh weights, a few prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import save_model, tiny_llama
from tiny_runs import salted_texts, settings_in
from tiny_texts import write_texts

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.generate.answers_file import Written, read_answers
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store import ShardReader
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import Sequences
from capgap.schemas.run_file import RunFile

SEQ_LEN = 48
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROUNDS: dict[str, Any] = {
    "engine": "transformers",
    "num": 2,
    "max_new_tokens": 10,
    "stop": ["e", "a"],
    "heldout_fraction": 0.3,
    "unit_prompts": 5,
}

_MADE_AGAIN = {"generate", "cache", "train", "eval", "report"}
ROUND_ROWS: list[tuple[str, Any, set[str]]] = [
    ("rounds.prompts", ["other.jsonl"], _MADE_AGAIN),
    ("rounds.prompts_per_round", 7, _MADE_AGAIN),
    ("rounds.num_samples", 7, _MADE_AGAIN),
    ("rounds.max_new_tokens", 7, _MADE_AGAIN),
    ("rounds.temperature", 0.5, _MADE_AGAIN),
    ("rounds.top_p", 0.5, _MADE_AGAIN),
    ("rounds.stop", ["a"], _MADE_AGAIN),
    ("rounds.seed", 1, _MADE_AGAIN),
    ("rounds.heldout_fraction", 0.2, _MADE_AGAIN),
    ("rounds.num_heldout_prompts", 7, _MADE_AGAIN),
    ("rounds.answer_pattern", "(a)", _MADE_AGAIN),
    ("rounds.engine", "transformers", _MADE_AGAIN),
    ("rounds.dtype", "float32", _MADE_AGAIN),
    ("rounds.unit_prompts", 7, _MADE_AGAIN),
    ("rounds.replicas", 2, set()),
    ("rounds.tensor_parallel", 2, set()),
    ("rounds.gpu_memory_fraction", 0.5, set()),
]
"""Setting, a value other than its default, and the stages that are made again for it."""
ROUND_STRUCTURE = {f"rounds.{name}" for name in ("num", "first_writer", "off_policy_arms", "replay")}
"""What rounds there are, and what a training reads of those before it."""


def prompt_lines(number: int) -> list[dict[str, Any]]:
    """Prompts of both kinds, some with a reference."""
    texts: list[dict[str, Any]] = [{"prompt": f"salt {i} is", "reference": "salt"} for i in range(number // 2)]
    chats = [{"messages": [{"role": "user", "content": f"what is {i}?"}]} for i in range(number - number // 2)]
    return texts + chats


def write_prompts(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def settings_of(folder: Path) -> dict[str, Any]:
    """A run file's settings; its texts, prompts and teacher are written there."""
    texts = salted_texts("salt")
    write_texts(folder, texts)
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.chat_template = TEMPLATE
    teacher = tiny_llama(2, max_position_embeddings=SEQ_LEN, initializer_range=0.2, vocab_size=len(tokenizer))
    save_model(folder / "given", teacher, tokenizer)
    return settings_in(folder, SEQ_LEN) | {
        "rounds": ROUNDS | {"prompts": write_prompts(folder / "prompts.jsonl", prompt_lines(24))},
        "train": {"batch_sequences": 2, "num_epochs": 2},
    }


def run_of(settings: dict[str, Any], **rounds: Any) -> RunFile:
    """The run file, with other settings of its rounds."""
    return RunFile.model_validate(settings | {"rounds": settings["rounds"] | rounds})


def make(run: RunFile, *names: str) -> dict[str, Manifest]:
    """Make these instances in this process, in the run's order."""
    return {one.name: carry_out(run, one) for one in instances(run) if one.name in names}


def start_in(run: RunFile) -> Callable[..., int]:
    """What stands for the driver's fresh processes."""

    def start(arguments: Any) -> int:
        name = arguments[arguments.index("--instance") + 1]
        carry_out(run, next(one for one in instances(run) if one.name == name), remake="--force" in arguments)
        return 0

    return start


FIRST = Instance("generate", round=0)


def answers_of(folder: Path, split: str) -> list[tuple[int, Written]]:
    """Each answer of a split, with the number of its shard."""
    paths = sorted(folder.glob(f"{split}-*.answers.parquet"))
    return [(number, one) for number, path in enumerate(paths) for one in read_answers(path)]


def shards_of(folder: Path, manifest: Manifest, split: str) -> list[Sequences]:
    """The rows of each shard of a split."""
    reader = ShardReader(folder, manifest.shard_sets[split])
    rows, member = [], 0
    for shard in manifest.shard_sets[split].shards:
        blocks = [reader.read(member + i)[0] for i in range(len(shard.members))]
        member += len(blocks)
        rows.append(type(blocks[0]).joined(blocks))
    return rows


def logprobs_again(folder: Path, manifest: Manifest, model: Any) -> torch.Tensor:
    """What transformers gives to each token of the student's answers, less what the writer said."""
    rows, differences = shards_of(folder, manifest, "student"), []
    for number, one in answers_of(folder, "student"):
        if one.row < 0:
            continue
        start = int(np.flatnonzero(rows[number].starts_BL1[one.row][: one.first]).max())
        ids = torch.tensor(rows[number].tokens_BL1[one.row, start : one.first + len(one.logprobs)][None])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        place = one.first - start
        found = logprobs[range(place - 1, len(ids[0]) - 1), ids[0, place:]]
        differences.append(found - torch.tensor(one.logprobs))
    return torch.cat(differences)
