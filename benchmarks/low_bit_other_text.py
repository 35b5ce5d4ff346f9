"""Measure the students of benchmarks/low_bit.py on another kind of text than they were trained on.

python benchmarks/low_bit_other_text.py          after benchmarks/low_bit.py, on the same machine: its students are kept

A training with cross-entropy learns the text, and one with the teacher's distributions learns to imitate the teacher.
The first may get worse on other text. The other text is the reference of the Python language that every Python carries
for `help()`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from low_bit import ROOT, slug, trained_in
from low_bit_page import ONLINE, PTQ, QAT
from machine import RESULTS, machine
from result_lines import Results
from torch import Tensor

from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.tokenizers import load_tokenizer

TEACHER = ROOT / "runs" / "real-models" / "SmolLM2-135M-Instruct"
SEQ_LEN, NUM_SEQUENCES = 512, 8
MEASURED = (PTQ, QAT, "QAD, sampled, n = 50", ONLINE)


def main() -> None:
    """Measure each student that has no line of results yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/low-bit-arms"),
        help="work folder of benchmarks/low_bit.py, which holds the students",
    )
    parser.add_argument(
        "--lines",
        type=Path,
        default=RESULTS / "low-bit.jsonl",
        help="results of benchmarks/low_bit.py, which name the students",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "low-bit-other-text.jsonl")
    flags = parser.parse_args()
    results, text_BL1 = Results(flags.results), other_text(NUM_SEQUENCES)
    teacher_NV = logprobs(str(TEACHER), text_BL1)
    labels_N1 = text_BL1[:, 1:].reshape(-1, 1)
    for line in Results(flags.lines).lines:
        if line["arm"] not in MEASURED or results.has(line["arm"], line["seed"], line["about"]):
            continue
        made = trained_in(flags.work, line["about"]["format"]["format"], line["arm"])
        model = made / "train" / slug(line["arm"]) / f"seed-{line['seed']}" / "model"
        student_NV = logprobs(str(model), text_BL1)
        results.add(
            {name: line[name] for name in ("arm", "seed", "about")}
            | {
                "loss": -float(student_NV.gather(1, labels_N1).mean()),
                "kl": float((teacher_NV.exp() * (teacher_NV - student_NV)).sum(1).mean()),
                "teacher_loss": -float(teacher_NV.gather(1, labels_N1).mean()),
                "num_tokens": len(labels_N1),
                "machine": machine("cpu"),
            }
        )
        print(results.lines[-1], flush=True)


def other_text(num_sequences: int) -> Tensor:
    """Return token ids [num_sequences, SEQ_LEN + 1] of sequences that are spread evenly over the whole text."""
    ids = load_tokenizer(str(TEACHER))("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    step = (len(ids) - SEQ_LEN - 1) // num_sequences
    return torch.tensor([ids[i * step : i * step + SEQ_LEN + 1] for i in range(num_sequences)])


def logprobs(path: str, tokens_BL1: Tensor) -> Tensor:
    """Return a model's logprobs of the next token, float32 [B * L, V]."""
    model = load_model(path, "cpu", "fast")
    with torch.inference_mode():
        rows = [model(tokens_1L[None, :-1]).logits[0].float().log_softmax(-1) for tokens_1L in tokens_BL1]
    return torch.cat(rows)


if __name__ == "__main__":
    main()
