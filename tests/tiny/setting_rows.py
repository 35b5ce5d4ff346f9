"""Rows of the table of all settings for sections that a run need not have: low-bit students, and other tokenizers.

Each is a setting, a value other than its default, and the stages that are made again for it.
"""

from __future__ import annotations

from typing import Any

Row = tuple[str, Any, set[str]]

_FROM_STUDENT = {"student", "train", "eval", "report"}
_FROM_ALIGN = {"align", *_FROM_STUDENT}

QUANTIZE_ROWS: list[Row] = [
    ("student.quantize.format", "mxfp4", _FROM_STUDENT),
    ("student.quantize.group_size", 64, _FROM_STUDENT),
    ("student.quantize.activations", False, _FROM_STUDENT),
    ("student.quantize.ignore", ["down_proj"], _FROM_STUDENT),
    ("student.quantize.head", True, _FROM_STUDENT),
    ("student.quantize.embedding", True, _FROM_STUDENT),
    ("student.quantize.num_sequences", 7, _FROM_STUDENT),
    ("student.quantize.batch_sequences", 7, set()),
]
ALIGN_ROWS: list[Row] = [
    ("align.tokenizer", "other", _FROM_ALIGN),
    ("align.bos", "never", _FROM_ALIGN),
    ("align.seq_len", 8, _FROM_ALIGN),
    ("align.recording", "topk", _FROM_ALIGN),
    ("align.min_border_probability", 0.5, _FROM_ALIGN),
    ("align.projected_top_k", 8, _FROM_ALIGN),
    ("train.projected_weight", 0.5, _FROM_STUDENT - {"student"}),
]

# of the text that a training ends with, what its student answers is made again too
_FROM_ROUND = {"train", "generate/distilled", "generate/cross_entropy", "eval", "report"}
_TRAINED = [f"{arm}/seed-{seed}" for arm in ("distilled", "cross_entropy") for seed in (0, 1)]
_LATER = {f"{stage}/{one}/{last}" for stage, last in (("train", "round-1"), ("generate", "final")) for one in _TRAINED}
_FROM_LATER_ROUND = {*_LATER, "eval", "report"}
ROUND_ROWS: list[Row] = [
    ("train.ratio_clip", 0.3, _FROM_ROUND),
    ("train.later_learning_rate", 1e-4, _FROM_LATER_ROUND),
]

FURTHER_ROWS = [*QUANTIZE_ROWS, *ALIGN_ROWS, *ROUND_ROWS]
"""All of them."""

FURTHER_BESIDE: dict[str, dict[str, Any]] = {
    **{path: {"student.quantize": {"format": "nvfp4"}} for path, _, _ in QUANTIZE_ROWS},
    "student.quantize.group_size": {"student.quantize": {"format": "int4"}},
    "student.quantize.embedding": {"student.quantize": {"format": "int8"}},
    **{path: {"align": {"tokenizer": "one"}} for path, _, _ in ALIGN_ROWS},
    "train.projected_weight": {"align": {"tokenizer": "one", "projected_top_k": 8}},
    "train.ratio_clip": {"rounds": {"prompts": "prompts.jsonl", "num": 1}, "train.divergence": "policy_gradient"},
    "train.later_learning_rate": {"rounds": {"prompts": "prompts.jsonl", "num": 2}},
}
"""What stands beside a setting, before it is changed and after."""
