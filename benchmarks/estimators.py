"""Better estimators of the teacher's distribution, and other losses on it: tried before they would become a setting.

python benchmarks/estimators.py train                    every arm at 3 seeds, on the demo's finished run
python benchmarks/estimators.py variance                 what each estimator adds to the variance of the gradient
python benchmarks/estimators.py rows                     the same at the head's logits and inputs alone, on any model
python benchmarks/estimators.py train --distillkit ~/DistillKit      its loss on its captures, too

Teacher and student stand in memory together, and the targets are made for each batch from the whole distributions.
Every arm of a seed starts from the same weights and sees the same sequences in the same order. A finished training is
a line of the results and is not done again.

Legend: N rows, V vocabulary, L rows of a sequence, P parameters.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

import torch
from distillkit_rows import DistillKit
from estimator_losses import LOSSES, PLAIN, TARGETS, Loss, cross_entropy_with_targets, whole_kl
from gradient_variance import Differences
from machine import RESULTS, keep, machine
from quality import Results
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.pipeline.eval.heldout import first_sequences
from capgap.pipeline.models.load import load_model, model_at
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader, keep_freed_memory
from capgap.pipeline.train.optimizer import optimizer_and_schedule
from capgap.schemas.run_optimization import OptimizationSettings

_NUM_HELDOUT = 32
_IDS_OF = (12, 25, 50, 100)  # samples of which the variance is told


def main() -> None:
    """Train or calculate; print; keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "variance", "rows"])
    run = Path("runs/demo")
    parser.add_argument("--name", default="demo", help="in the results")
    parser.add_argument("--corpus", type=Path, default=run / "corpus", help="a finished stage's folder")
    parser.add_argument("--teacher", default=str(run / "teacher"), help="a finished stage's or a model's folder")
    parser.add_argument("--student", default=str(run / "student/seed-0"), help="likewise")
    parser.add_argument("--fresh", action="store_true", help="a student of that shape, drawn at each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=131_072, help="of every training")
    parser.add_argument("--batches", type=int, default=8, help="of which the variance is told")
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--distillkit", type=Path, help="a checkout")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    flags = parser.parse_args()
    keep_freed_memory()
    setting = Setting(flags)
    if flags.what != "train":
        figures = (added_variance if flags.what == "variance" else errors_of_rows)(setting, flags.batches)
        print(keep(f"estimators-{flags.what}-{flags.name}", "cpu", figures, flags.results))
        return
    losses = LOSSES | (_of_distillkit(flags.distillkit, setting.vocab_size) if flags.distillkit else {})
    results = Results(flags.results / f"estimators-{flags.name}.jsonl")
    for seed in range(flags.seeds):
        for arm, loss in losses.items():
            if not results.has(arm, seed, setting.about):
                results.add(setting.train(arm, loss, seed))
                print(results.lines[-1], flush=True)
    print(table([line for line in results.lines if line["about"] == setting.about]))


class Setting:
    """Models, text and settings of all trainings.

    Attributes:
        vocab_size: the real one.
        teacher: in float32.
        about: what a line of the results is about.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        manifest = read_manifest(flags.corpus)
        assert manifest is not None, f"{flags.corpus} is no finished stage"
        self._flags = flags
        self.vocab_size = int(manifest.facts["tokenizer"]["vocab_size"])  # type: ignore[index,call-overload,arg-type]
        self._reader = ShardReader(flags.corpus, manifest.shard_sets["student"])
        self._heldout = first_sequences(flags.corpus, manifest.shard_sets["heldout"], _NUM_HELDOUT)
        self.teacher = load_model(model_at(flags.teacher), "cpu", torch.float32).requires_grad_(False)
        self.about = {
            "corpus": manifest.content[:12],
            "num_tokens": flags.tokens,
            "batch_sequences": flags.batch_sequences,
            "learning_rate": flags.learning_rate,
            "fresh": flags.fresh,
        }

    def train(self, arm: str, loss: Loss, seed: int) -> dict[str, Any]:
        """One line of the results."""
        flags, started = self._flags, time.process_time()
        student, generator = self.student(seed), torch.Generator().manual_seed(seed)
        settings = OptimizationSettings(learning_rate=flags.learning_rate, batch_sequences=flags.batch_sequences)
        loader = self.batches(seed, flags.tokens)
        made = optimizer_and_schedule(student.parameters(), settings, len(loader))
        for batch in loader:
            student.zero_grad()
            self.loss_of(batch, student, loss, generator).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip_norm)
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        kl, nats = self._measure(student.eval())
        about = {"num_steps": len(loader), "cpu_s": round(time.process_time() - started, 1), "about": self.about}
        return {"arm": arm, "seed": seed, "heldout_loss": nats, "kl": kl} | about | {"machine": machine("cpu")}

    def student(self, seed: int) -> PreTrainedModel:
        """Before its first step."""
        student = load_model(model_at(self._flags.student), "cpu", torch.float32)
        if self._flags.fresh:
            torch.manual_seed(seed)
            student.config.vocab_size = self.teacher.config.vocab_size
            student = AutoModelForCausalLM.from_config(student.config)
        return student.train()

    def batches(self, seed: int, num_tokens: int) -> SequenceLoader:
        """In the seed's order."""
        return SequenceLoader(self._reader, LoaderSettings(self._flags.batch_sequences, seed, max_tokens=num_tokens))

    def loss_of(self, batch: Batch, student: PreTrainedModel, loss: Loss, generator: torch.Generator) -> Tensor:
        """Of a batch, whose rows all count."""
        with torch.no_grad():
            logp_NV = self.logprobs(self.teacher, batch.input_ids_BL)
        return loss(self.logprobs(student, batch.input_ids_BL), logp_NV, batch.input_ids_BL.shape[1], generator)

    def logprobs(self, model: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
        """[N, V] of the real vocabulary."""
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits[..., : self.vocab_size]
        return torch.log_softmax(logits_BLV.flatten(0, 1).float(), -1)

    @torch.inference_mode()
    def _measure(self, student: PreTrainedModel) -> tuple[float, float]:
        """Held-out KL from the teacher and loss on the text, nats a token."""
        kls, losses = [], []
        for tokens_L1 in self._heldout.tokens_BL1:
            tokens_1L1 = torch.from_numpy(tokens_L1[None]).long()
            logq_LV, logp_LV = (self.logprobs(one, tokens_1L1[:, :-1]) for one in (student, self.teacher))
            kls.append(float((logp_LV.exp() * (logp_LV - logq_LV)).sum(-1).mean()))
            losses.append(-float(logq_LV.gather(1, tokens_1L1[0, 1:, None]).mean()))
        return round(statistics.mean(kls), 6), round(statistics.mean(losses), 6)


def table(lines: list[dict[str, Any]]) -> str:
    """KL and loss of every arm, and its distance in KL from the plain one at the same seed."""
    rows = []
    of = {(line["arm"], line["seed"]): line for line in lines}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        plain = PLAIN.get(arm, "sampled" if arm.startswith("DistillKit") else None)
        apart = [line["kl"] - of[plain, line["seed"]]["kl"] for line in own if plain and (plain, line["seed"]) in of]
        means = [f"{name} {statistics.mean(line[name] for line in own):.4f}" for name in ("kl", "heldout_loss")]
        against = f", KL {statistics.mean(apart):+.4f} {_error(apart)}against `{plain}`" if apart else ""
        rows.append(f"{arm}: {', '.join(means)}{against}, {len(own)} seeds")
    return "\n".join(rows)


def _error(apart: list[float]) -> str:
    return f"+- {statistics.stdev(apart) / math.sqrt(len(apart)):.4f} " if len(apart) > 1 else ""


def added_variance(setting: Setting, num_batches: int) -> dict[str, Any]:
    """Of each estimator at each number of samples, over the variance of the whole distributions' gradient."""
    kinds = {(name, n): partial(make, num_samples=n) for n in _IDS_OF for name, make in TARGETS.items()}
    student, generator = setting.student(0), torch.Generator().manual_seed(0)
    exact, sums = Differences(), {kind: Differences() for kind in kinds}
    ids: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for batch in _some(setting.batches(0, 1 << 40), num_batches):
        with torch.no_grad():
            logp_NV = setting.logprobs(setting.teacher, batch.input_ids_BL)
        exact_P = _gradient(student, whole_kl(setting.logprobs(student, batch.input_ids_BL), logp_NV, 1, generator))
        exact.add(exact_P)
        for kind, make in kinds.items():
            taken_NV = make(logp_NV.exp(), generator)
            ids[kind].append(float((taken_NV > 0).sum(-1).float().mean()))
            logq_NV = setting.logprobs(student, batch.input_ids_BL)
            loss = cross_entropy_with_targets(logq_NV, logp_NV, 1, generator, targets=lambda p, g, t=taken_NV: t)
            sums[kind].add(_gradient(student, loss) - exact_P)
        print(f"batch {exact.number} of {num_batches}", flush=True)
    rows = []
    for name, n in kinds:
        share = sums[name, n].mean_square / exact.variance
        of_systematic = sums[name, n].mean_square / sums["systematic", n].mean_square
        row = {"estimator": name, "num_samples": n, "ids_per_token": round(statistics.mean(ids[name, n]), 2)}
        rows.append(row | {"added_variance": round(share, 5), "of_systematic": round(of_systematic, 4)})
        print(rows[-1], flush=True)
    return {"about": setting.about, "num_batches": num_batches, "estimators": rows}


@torch.no_grad()
def errors_of_rows(setting: Setting, num_batches: int) -> dict[str, Any]:
    """Mean squared error of a row's gradient at the logits, s q - w, and through the head, s the sum of the weights w.

    Beside it the tokens of at least 1 / n, whose probabilities `threshold` would have to store.
    """
    kinds = {(name, n): partial(make, num_samples=n) for n in _IDS_OF for name, make in TARGETS.items()}
    student, generator = setting.student(0).eval(), torch.Generator().manual_seed(0)
    weight_VH = student.get_output_embeddings().weight[: setting.vocab_size].float()
    sums: dict[Any, list[float]] = {kind: [0.0] * 4 for kind in kinds}
    num_rows, entropy = 0, 0.0
    for batch in _some(setting.batches(0, 1 << 40), num_batches):
        p_NV = setting.logprobs(setting.teacher, batch.input_ids_BL).exp()
        q_NV = setting.logprobs(student, batch.input_ids_BL).exp()
        num_rows += len(p_NV)
        entropy += float(torch.special.entr(p_NV).sum())
        for (name, n), make in kinds.items():
            taken_NV = make(p_NV, generator)
            apart_NV = (taken_NV.sum(-1, keepdim=True) - 1) * q_NV - taken_NV + p_NV
            found = (apart_NV, apart_NV @ weight_VH)
            parts = [float(one.double().square().sum()) for one in found]
            parts += [float((taken_NV > 0).sum()), float((p_NV >= 1 / n).sum())]
            sums[name, n] = [old + new for old, new in zip(sums[name, n], parts, strict=True)]
        print(f"{num_rows} rows", flush=True)
    rows = []
    for name, n in kinds:
        at_logits, at_hidden, ids, exact = (one / num_rows for one in sums[name, n])
        of_systematic = [sums[name, n][i] / sums["systematic", n][i] for i in range(2)]
        row = {"estimator": name, "num_samples": n, "ids_per_token": round(ids, 2), "exact_ids": round(exact, 2)}
        row |= {"at_logits": round(at_logits, 6), "through_head": round(at_hidden, 6)}
        rows.append(
            row | dict(zip(("logits_ratio", "head_ratio"), (round(one, 4) for one in of_systematic), strict=True))
        )
        print(rows[-1], flush=True)
    return {"about": setting.about, "num_rows": num_rows, "entropy": round(entropy / num_rows, 3), "estimators": rows}


def _some(batches: SequenceLoader, number: int) -> Iterator[Batch]:
    for batch, _ in zip(batches, range(number), strict=False):
        yield batch


def _gradient(student: PreTrainedModel, loss: Tensor) -> Tensor:
    student.zero_grad()
    loss.backward()
    return torch.cat([one.grad.flatten() for one in student.parameters() if one.grad is not None])


def _of_distillkit(folder: Path, vocab_size: int) -> dict[str, Loss]:
    """Its sparse KL on what its compression gives back, each way in which it takes the rest."""
    peer = DistillKit(folder)
    return {f"DistillKit {peer.commit}, {name}": loss for name, loss in peer.losses(vocab_size).items()}


if __name__ == "__main__":
    main()
