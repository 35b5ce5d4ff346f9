"""Measure speculative decoding: a student drafts for the teacher in vLLM, and the tokens that it accepts are counted.

stage --DraftJob--> a process of its own, which runs vLLM with both models and frees their memory by ending --> Drafted

Both models sample at temperature 1, and drafts are judged by rejection sampling (Leviathan et al., arXiv 2211.17192;
Chen et al., arXiv 2302.01318): the first token of a draft is accepted with the probability sum over ids of min(p, q).
`AgainstTeacher.acceptance` predicts this probability on held-out text; here it is counted on text that the teacher
writes.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from capgap.pipeline.cache.vllm_start import llm_settings, memory_settings, require_platform, set_environment
from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.configs import load_config
from capgap.pipeline.stage.orphans import die_with
from capgap.schemas.errors import CapgapError, MachineError, SettingError
from capgap.schemas.records import Sequences
from capgap.schemas.results import Drafted
from capgap.schemas.run_eval import SpeculativeSettings

_MOST_AT_ONCE = 64
_FIX = "leave eval.speculative out, or measure on a machine where vLLM runs both models"


@dataclass(frozen=True)
class DraftJob:
    """What a process needs to measure one student's drafts for the teacher.

    Attributes:
        teacher: Folder or Hugging Face id of the teacher.
        student: Folder of the student.
        prompts: Token ids of the prompts that are continued, all of one length.
        settings: The settings `eval.speculative`.
        device: The device, such as `cpu` or `cuda:0`.
        trust_remote_code: Whether code that comes with the models may run.
    """

    teacher: str
    student: str
    prompts: tuple[tuple[int, ...], ...]
    settings: SpeculativeSettings
    device: str
    trust_remote_code: bool = False


def prompts_of(sequences: Sequences, settings: SpeculativeSettings) -> tuple[tuple[int, ...], ...]:
    """Return the beginnings of the first sequences as prompts.

    Raises:
        SettingError: A sequence is not longer than the number of new tokens.
    """
    room = sequences.tokens_BL1.shape[1] - 1 - settings.num_new_tokens
    if room < 1:
        raise SettingError(
            "no room for a prompt",
            where="eval.speculative.num_new_tokens",
            found=settings.num_new_tokens,
            expected=f"fewer than corpus.seq_len, {sequences.tokens_BL1.shape[1] - 1}",
        )
    length = min(settings.num_prompt_tokens, room)
    return tuple(tuple(map(int, row)) for row in sequences.tokens_BL1[: settings.num_prompts, :length])


def require_drafting() -> None:
    """Raise MachineError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MachineError("vLLM is not installed", where="eval.speculative", fix=_FIX)


def drafted(job: DraftJob) -> Drafted:
    """Run the job and return its counts; this starts vLLM, and needs memory for both models at once.

    Raises:
        MachineError: vLLM cannot run these models together, or failed.
    """
    # the end of the process certainly frees the models' memory before the next student is loaded
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=die_with, initargs=(os.getpid(),)) as pool:
        try:
            found = pool.submit(_drafted_or_why_not, job).result()
        except BrokenProcessPool:
            found = "its process was killed, perhaps because memory ran out"
    if isinstance(found, str):
        raise MachineError(
            "speculative decoding cannot be measured", where=f"eval.speculative: {job.student}", found=found, fix=_FIX
        )
    return found


def _drafted_or_why_not(job: DraftJob) -> Drafted | str:
    try:
        return _drafted(job)
    except CapgapError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _drafted(job: DraftJob) -> Drafted:
    set_environment(job.device, 1)
    import vllm

    require_platform(job.device)
    if job.device == "cpu":
        _mend_temperatures()
    for path in (job.teacher, job.student):
        require_complete(path, job.trust_remote_code)
    settings, config = job.settings, load_config(job.teacher, job.trust_remote_code)
    length = len(job.prompts[0]) + settings.num_new_tokens + settings.num_speculative_tokens
    at_once = min(len(job.prompts), _MOST_AT_ONCE)
    tokens = at_once * length
    llm = vllm.LLM(
        **{**llm_settings(job.teacher, config, job.device, job.trust_remote_code), "disable_log_stats": False},
        max_model_len=length + 1,
        max_num_batched_tokens=max(tokens, 512),
        max_num_seqs=at_once,
        speculative_config={
            "method": "draft_model",
            "model": job.student,
            "num_speculative_tokens": settings.num_speculative_tokens,
            # by default vLLM drafts the top-1 token, which is accepted only with the teacher's probability of it
            "draft_sample_method": "probabilistic",
        },
        **memory_settings(config, job.device, tokens, length, settings.gpu_memory_fraction, 1, 1),
    )
    try:
        llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in job.prompts],
            vllm.SamplingParams(max_tokens=settings.num_new_tokens, temperature=1.0, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    finally:
        llm.llm_engine.engine_core.shutdown()
    drafts: Any = metrics["vllm:spec_decode_num_drafts"]
    accepted: Any = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"]
    return Drafted(
        num_speculative_tokens=settings.num_speculative_tokens,
        num_drafts=int(drafts.value),
        num_accepted_by_place=tuple(map(int, accepted.values)),
        engine=f"vllm {vllm.__version__}",
    )


def _mend_temperatures() -> None:
    """Replace the vLLM function that repeats a request's temperature for each of its drafted tokens.

    The CPU build (seen in 0.32.0) writes the temperatures into a copy of another dtype, and divides the teacher's
    logits by uninitialised memory: where the student was the teacher itself, only a tenth of the drafts were accepted.
    """
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = _spread


def _spread(
    values_B: torch.Tensor, ends_B: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens, which end at `ends_B`, and replace one value by another."""
    values_B = torch.where(values_B == replace_from, torch.full_like(values_B, replace_to), values_B)
    sizes_B = torch.diff(ends_B, prepend=ends_B.new_zeros(1)).long()
    return values_B.repeat_interleave(sizes_B, output_size=num_tokens)
