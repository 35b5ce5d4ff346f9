"""The card of an exported cache: what the files hold, where they came from, and how to read them with `datasets`."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.run_cache import RecordingName

CARD_NAME = "README.md"

_COLUMNS = {
    "input_ids": "tokens of a sequence, one more than it has targets",
    "starts": "true where a token begins a document",
    "loss_mask": "true where a token counts as a label; a sequence's first one never does",
    "ids": "for each target its ids; target i is what the teacher expects after token i, a prediction of token i + 1",
    "logprobs": "of `topk`: their logprobs, nats",
    "counts": "of `sampled`: how often each was sampled; a count over the number of samples estimates its probability",
    "tail": "of `topk`: the probability of all other ids together",
    "log_tails": "of `topk` at further temperatures: for each of them, the logarithm of a sum over all other ids; each "
    "term is the id's probability to the power of recorded temperature / further temperature",
    "label_logprobs": "the teacher's logprob of token i + 1; null where it is not known",
}


def card(
    location: str, manifest: Manifest, facts: CacheFacts, parts: Mapping[tuple[RecordingName, str], ShardSet]
) -> str:
    """Return the card's text, with the header by which the Hugging Face hub finds the files."""
    names = list(dict.fromkeys(name for name, _ in parts))
    configs = [
        {
            "config_name": name,
            "data_files": [
                {"split": split, "path": f"{name}/{split}-*.parquet"} for own, split in parts if own == name
            ],
        }
        for name in names
    ]
    head = yaml.safe_dump({"configs": configs, "tags": ["knowledge-distillation", "capgap"]}, sort_keys=False)
    return "\n".join([f"---\n{head}---\n", *_text(location, manifest, facts, parts, names)]) + "\n"


def _text(
    location: str,
    manifest: Manifest,
    facts: CacheFacts,
    parts: Mapping[tuple[RecordingName, str], ShardSet],
    names: list[RecordingName],
) -> list[str]:
    rows = [
        f"| `{name}` | {split} | {of.num_sequences:,} | {of.seq_len:,} | {of.num_tokens:,} |"
        for (name, split), of in parts.items()
    ]
    recordings = []
    for name in names:
        of = facts.recordings[name]
        kept = f"{of.num_ids} samples" if name == "sampled" else f"{of.num_ids} ids, profile {of.profile}"
        temperatures = ", ".join(f"{one:g}" for one in of.temperatures)
        recordings.append(f"- `{name}`: {kept} a target; a student can train at temperature {temperatures}")
    return [
        "# Distributions of a teacher",
        "",
        f"Exported by capgap from the cache `{location}`, content `{manifest.content[:12]}`.",
        "",
        *recordings,
        f"- teacher: {_teacher(manifest)}, {', '.join((*facts.engines, *facts.dtypes))}, recorded at temperature "
        f"{facts.temperature:g}",
        f"- tokenizer: {facts.tokenizer.vocab_size:,} ids, fingerprint `{facts.tokenizer.fingerprint[:12]}`",
        f"- context: `{facts.context}`"
        + (" (the teacher saw the whole sequence)" if facts.context == "packed" else " (each document by itself)"),
        "",
        "| config | split | sequences | targets a sequence | targets |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "A row is a sequence. Values are those that the cache gives a training, rounding of its profile included.",
        "",
        "| column | holds |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in _COLUMNS.items()),
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("parquet", data_files="{names[0]}/train-*.parquet", split="train", streaming=True)',
        "```",
    ]


def _teacher(manifest: Manifest) -> str:
    path = manifest.resolved.get("teacher", {}).get("path")
    return f"`{path}`" if path else "trained in the same run"
