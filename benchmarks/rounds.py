"""Compare fine-tuning, off-policy and on-policy distillation at equal student tokens, on written-out additions.

python benchmarks/rounds.py                    every training that is not in the results, then the table
python benchmarks/rounds.py --smoke            the same at the smallest size, to check that it works
python benchmarks/rounds_page.py               the table of docs/rounds.md

A teacher learns to add numbers and to write down each step. A student of about a quarter of its size starts with fresh
weights, learns from the teacher's text in round 0, and continues with one of these arms:

sft               cross-entropy with further text by the teacher
off_policy        KL to the teacher on further text by the teacher
rounds            KL to the teacher on the student's own text, which is written and scored round by round
policy_gradient   the same, but the student learns only from the teacher's logprob of each written token
online            KL to the teacher on the student's own text, which is written anew and scored live for every step

All arms of a seed start with the same weights and see as many tokens in as many steps; `online` takes the weights of
`rounds` after round 0. The measure is the share of right answers to held-out prompts, with the top-1 token at each
step. A finished training is a line of the results, and is not repeated; a killed stage continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import RESULTS, machine
from result_lines import Results
from rounds_page import table

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.generate.prompts import PromptRecord, read_prompts, split_prompts
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.report.round_staleness import staleness
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.rounds import cache_of, text_of, writer_of
from capgap.pipeline.store import keep_freed_memory
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.driver import start_afresh, walk
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.run_file import RunFile

ONLINE = "online"
ARMS: dict[str, dict[str, Any]] = {
    "rounds": {},
    # at the other arms' learning rate, the policy gradient makes the student forget what it knew
    "policy_gradient": {"divergence": "policy_gradient", "later_learning_rate": 1e-4},
    "off_policy": {},
    "sft": {"alpha": 0.0},
}
# the answer is the last number of the text
ANSWER = r"(\d+)\s*$"


def main() -> None:
    """Run the trainings that the results lack, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/rounds-addition"), help="folder of the run and the online trainings"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "rounds-addition.jsonl")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    keep_freed_memory()
    os.environ.setdefault("CAPGAP_LEASE_DIR", str((flags.work / "leases").resolve()))
    bench = Bench(flags.work, SMOKE if flags.smoke else Size())
    results = Results(flags.results)
    for seed in range(flags.seeds):
        missing = [arm for arm in (*ARMS, ONLINE) if not results.has(arm, seed, bench.about)]
        if missing:
            bench.make(seed)
        for arm in missing:
            results.add({"arm": arm, "seed": seed, **bench.measured(arm, seed), "about": bench.about})
            print(f"{time.strftime('%H:%M:%S')} {arm}, seed {seed}: {results.lines[-1]}", flush=True)
    print("\n".join(f"| {' | '.join(row)} |" for row in table(results.lines)))


@dataclass(frozen=True)
class Size:
    """Sizes of the task, the models and the trainings; the models' tuples are those of `shape`."""

    num_texts: int = 40_000
    num_prompts: int = 3_600
    num_digits: int = 2
    max_new_tokens: int = 28
    seq_len: int = 96
    prompts_per_round: int = 256
    num_rounds: int = 3
    round_tokens: int = 120_000
    batch_sequences: int = 4
    teacher_epochs: int = 2
    engine: str = "transformers"
    teacher: tuple[int, int, int, int] = (96, 4, 3, 288)
    student: tuple[int, int, int, int] = (64, 2, 2, 192)


SMOKE = Size(200, 60, 1, 12, 32, 40, 2, 256, 2, 80, "transformers", (32, 1, 2, 32), (16, 1, 2, 32))


def shape(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    """Return a model's shape in the form of the run file."""
    return dict(zip(("hidden_size", "num_layers", "num_heads", "intermediate_size"), sizes, strict=True))


def worked_sum(first: int, second: int, num_digits: int) -> str:
    """Return an addition column by column from the right, then the sum: `347+589=7+9=16 4+8+1=13 3+5+1=9 936`."""
    steps, carry = [], 0
    for place in range(num_digits):
        digits = [first // 10**place % 10, second // 10**place % 10] + [1] * carry
        steps.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    return f"{first:0{num_digits}}+{second:0{num_digits}}={' '.join(steps)} {first + second}"


class Bench:
    """The task, its models, and the run that all seeds share.

    Args:
        work: Folder of the task's files, the run and the online trainings.
        size: Sizes of the task, the models and the trainings.
    """

    def __init__(self, work: Path, size: Size) -> None:
        self.work, self.size = work, size
        self.about = json.loads(json.dumps(asdict(size))) | {"machine": machine("cpu")["device"]}
        work.mkdir(parents=True, exist_ok=True)
        most, draw = 10**size.num_digits, random.Random(0)
        sums = [(draw.randrange(most), draw.randrange(most)) for _ in range(size.num_texts)]
        texts = [worked_sum(*one, size.num_digits) for one in sums]
        lines = [json.dumps({"text": text}) for text in texts]
        prompts = []
        for first, second in [(draw.randrange(most), draw.randrange(most)) for _ in range(size.num_prompts)]:
            asked = worked_sum(first, second, size.num_digits).partition("=")[0] + "="
            prompts.append(json.dumps({"prompt": asked, "reference": str(first + second)}))
        for name, written in (("texts.jsonl", lines), ("prompts.jsonl", prompts)):
            if not (work / name).is_file():
                write_atomically(work / name, "".join(line + "\n" for line in written))
        if not (work / "tokenizer").is_dir():
            # 256 byte tokens, and one that ends a text
            train_tokenizer(texts[:100], 257).save_pretrained(work / "tokenizer")

    def run(self, seed: int) -> RunFile:
        """Return the run file of a seed; all seeds share one folder, and so the teacher and its text."""
        size = self.size
        return RunFile.model_validate(
            {
                "name": "rounds-addition",
                "out": str(self.work / "out"),
                "device": "cpu",
                "seeds": [seed],
                "corpus": {
                    "sources": [str(self.work / "texts.jsonl")],
                    "tokenizer": str(self.work / "tokenizer"),
                    "seq_len": size.seq_len,
                    "context": "document",
                    "teacher_fraction": 0.8,
                    "heldout_fraction": 0.1,
                },
                "teacher": {"model": shape(size.teacher), "training": {"num_epochs": size.teacher_epochs}},
                "rounds": {
                    "prompts": str(self.work / "prompts.jsonl"),
                    "num": size.num_rounds,
                    "off_policy_arms": ["off_policy", "sft"],
                    "prompts_per_round": size.prompts_per_round,
                    "max_new_tokens": size.max_new_tokens,
                    "answer_pattern": ANSWER,
                    "heldout_fraction": 0.15,
                    # few, because this benchmark measures the answers itself, with many more prompts
                    "num_heldout_prompts": 32,
                    "engine": size.engine,
                },
                "cache": {"engine": "transformers", "recording": "topk", "top_k": 32},
                "student": {"model": shape(size.student)},
                "train": {
                    "learning_rate": 2e-3,
                    "batch_sequences": size.batch_sequences,
                    # `max_tokens` ends every training; this is more than enough passes over any text
                    "num_epochs": 40,
                    "max_tokens": size.round_tokens,
                    "loggers": [],
                },
                "arms": ARMS,
            }
        )

    def make(self, seed: int) -> None:
        """Make every stage of the seed's run."""
        run = self.run(seed)

        def log(name: str, why: str) -> None:
            if why != "current":
                print(f"{name}: {why}", file=sys.stderr)

        def start(arguments: Sequence[str]) -> int:
            name = arguments[arguments.index("--instance") + 1]
            if self.size.engine == "vllm" and name.startswith("generate"):
                # vLLM only frees its memory when its process ends
                return start_afresh(arguments)
            carry_out(run, next(one for one in instances(run) if one.name == name), remake="--force" in arguments)
            return 0

        walk(run, instances(run), log=log, start=start)

    def measured(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the figures of an arm of the seed that was made last; the arm `online` is trained here."""
        run = self.run(seed)
        if arm == ONLINE:
            return self._online(run, seed)
        trainings = [Instance("train", arm, seed, number) for number in range(self.size.num_rounds)]
        texts = [text_of(run, arm, seed, number) for number in range(self.size.num_rounds)]
        written = sum(self._totals(one.name)["answer_tokens"] for one in texts if writer_of(one) == "teacher")
        cached = [self._totals(cache_of(one).name) for one in texts]
        scored = sum(one["num_tokens"] for one in cached) if run.train_settings(arm).largest_alpha > 0 else 0
        return {
            "right": self._right(self.out / trainings[-1].name / "model"),
            "teacher_right": self._right(self.out / "teacher" / "model"),
            "teacher_tokens": written + scored,
            "student_tokens": sum(self._totals(one.name)["num_tokens"] for one in trainings),
            "right_by_round": [self._right(self.out / one.name / "model") for one in trainings],
            "writer_kl_by_round": [one["writer_kl"] for one in cached],
            "ratios_by_round": [staleness(self.out / one.name) for one in trainings],
        }

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return self.work / "out"

    def _totals(self, name: str) -> dict[str, Any]:
        totals: dict[str, Any] = json.loads((self.out / name / "manifest.json").read_bytes())["totals"]
        return totals

    def _prompts(self) -> dict[str, list[PromptRecord]]:
        every, rounds = read_prompts((str(self.work / "prompts.jsonl"),)), self.run(0).rounds
        assert rounds is not None
        rounds = rounds.model_copy(update={"num_heldout_prompts": self.size.num_prompts})
        return {split: [every[place] for place in some] for split, some in split_prompts(every, rounds, 0).items()}

    def _right(self, folder: Path) -> float:
        """Return the share of held-out prompts that a model answers rightly, with its top-1 token at each step."""
        model, tokenizer = load_model(str(folder), "cpu"), load_tokenizer(str(self.work / "tokenizer"))
        prompts = self._prompts()["heldout"]
        ids_BP = _prompt_ids([one.text for one in prompts], tokenizer)
        answers = tokenizer.batch_decode(
            _written(model, ids_BP, self.size.max_new_tokens, tokenizer.eos_token_id, sampled=False)[0],
            skip_special_tokens=True,
        )
        found = [re.findall(ANSWER, answer) for answer in answers]
        return fmean(bool(one) and one[-1] in prompt.references for one, prompt in zip(found, prompts, strict=True))

    def _online(self, run: RunFile, seed: int) -> dict[str, Any]:
        """Train on-policy with a live teacher, for as many tokens and steps as `rounds` takes after round 0."""
        size = self.size
        tokenizer = load_tokenizer(str(self.work / "tokenizer"))
        teacher = load_model(str(self.out / "teacher" / "model"), "cpu").requires_grad_(False)
        student = load_model(str(self.out / f"train/rounds/seed-{seed}/round-0/model"), "cpu")
        totals = [self._totals(f"train/rounds/seed-{seed}/round-{number}") for number in range(size.num_rounds)]
        num_steps, num_tokens = (sum(one[name] for one in totals[1:]) for name in ("num_steps", "num_tokens"))
        texts = [one.text for one in self._prompts()["student"]]
        settings = run.train_settings("rounds")
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        draw, seen, per_step = random.Random(seed), 0, num_tokens / num_steps
        # as many answers per step as the rows of the rounds' trainings hold
        text, cached = (self._totals(f"{stage}/rounds/seed-{seed}/round-1") for stage in ("generate", "cache"))
        count = max(1, round(per_step * text["answers"] / cached["num_tokens"]))
        torch.manual_seed(seed)
        for step in range(num_steps):
            warmth = min(1.0, (step + 1) / max(1, 0.05 * num_steps))
            for group in optimizer.param_groups:
                # falls to a tenth, as in the trainings of the rounds
                group["lr"] = settings.learning_rate * warmth * (1 - 0.9 * step / num_steps)
            ids_BP = _prompt_ids(draw.choices(texts, k=count), tokenizer)
            written_BM, counts_BM = _written(student, ids_BP, size.max_new_tokens, tokenizer.eos_token_id, sampled=True)
            ids_BL = torch.cat([ids_BP, written_BM], 1)
            first = ids_BP.shape[1] - 1
            with torch.no_grad():
                p_BMV = teacher(ids_BL[:, :-1]).logits[:, first:].log_softmax(-1)
            q_BMV = student(ids_BL[:, :-1]).logits[:, first:].log_softmax(-1)
            kl_BM = (p_BMV.exp() * (p_BMV - q_BMV)).sum(-1)
            loss = (kl_BM * counts_BM).sum() / counts_BM.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip_norm)
            optimizer.step()
            # padding counts, as in the rows of the rounds' trainings
            seen += round(per_step)
        folder = self.work / "online" / f"seed-{seed}"
        student.save_pretrained(folder)
        round_0 = self._totals("cache/round-0")["num_tokens"] + self._totals("generate/round-0")["answer_tokens"]
        return {
            "right": self._right(folder),
            "teacher_tokens": seen + round_0,
            "student_tokens": seen + totals[0]["num_tokens"],
        }


def _prompt_ids(texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Return the ids of the prompts [B, P], which all have one length, so that no padding is needed."""
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])


@torch.no_grad()
def _written(
    model: Any, ids_BP: torch.Tensor, num_tokens: int, eos_id: int, sampled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids that a model writes [B, M], filled up with the end token, and which of them count, bool [B, M]."""
    made_BL = model.generate(
        ids_BP,
        attention_mask=torch.ones_like(ids_BP),
        max_new_tokens=num_tokens,
        do_sample=sampled,
        top_k=0 if sampled else None,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    written_BM = made_BL[:, ids_BP.shape[1] :]
    ended_BM = (written_BM == eos_id).cumsum(1)
    # the first end token counts, and nothing after it
    return written_BM, (ended_BM == 0) | ((ended_BM == 1) & (written_BM == eos_id))


if __name__ == "__main__":
    main()
