"""Checks between the sections of a run file: a cache needs a teacher, a training a cache, a loss its recording.

Every message begins with the setting at fault, says what was found and expected, and what to write.
"""

from __future__ import annotations

from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_sections import RunSections
from capgap.schemas.run_train import SUPPORTED_TAILS, TrainSettings


def require_needs(run: RunSections) -> None:
    """Raise ValueError if a section needs another section that is missing, or contradicts it."""
    if not run.sections:
        raise ValueError(
            "found no section, expected at least one that asks for a stage, for example corpus, teacher and cache "
            "for shards, or reuse, student and train for a student"
        )
    _require_models(run)
    _require(run, "cache", "corpus")
    _require_rounds(run)
    _require(run, "cache", "teacher")
    _require_server(run)
    _require_align(run)
    _require_text(run, "student")
    _require(run, "train", "student")
    _require(run, "train", "cache")
    if run.makes("train"):
        for arm in run.arms:
            _require_arm(run, arm)
    _require_tune(run)
    _require_eval(run)
    for section in ("benchmarks", "judge"):
        if run.makes(section) and not (run.has("train") or run.has("tune") or run.has_teacher_model):
            raise ValueError(f"{section}: found no model to ask, expected a section train, tune or teacher beside it")


def _require(run: RunSections, section: str, needed: str) -> None:
    if run.makes(section) and not run.has(needed):
        raise ValueError(f"{section}: found without {needed}, expected {_given(needed)} beside it")


def _given(section: str) -> str:
    reused = f", or reuse: {{{section}: FOLDER}}," if section in ("corpus", "teacher", "cache") else ""
    return f"a section {section}{reused}"


def _require_teacher_model(run: RunSections, found: str, purpose: str) -> None:
    if not run.has("teacher"):
        raise ValueError(f"{found} without a teacher {purpose}, expected {_given('teacher')} beside it")
    if not run.has_teacher_model:
        raise ValueError(
            f"{found} with teacher.served, expected a teacher {purpose} on this machine; a server gives only logprobs"
        )


def _require_server(run: RunSections) -> None:
    """Raise ValueError unless `cache.engine: server` and `teacher.served` are both given or both left out."""
    if not run.makes("cache") or not run.makes("teacher"):
        return
    if run.cache.engine == "server" and run.teacher.served is None:
        raise ValueError(
            "cache.engine: found server without teacher.served, expected the name by which the server knows the teacher"
        )
    if run.cache.engine != "server" and run.teacher.served is not None:
        raise ValueError(
            f"cache.engine: found {run.cache.engine} with teacher.served, expected server, or teacher.path alone"
        )


def _require_align(run: RunSections) -> None:
    """Raise ValueError for settings that a run with `align` does not support, as its student has another tokenizer."""
    if run.align is None:
        return
    _require(run, "align", "cache")
    if run.makes("cache") and run.cache.temperature != 1:
        raise ValueError(
            f"cache.temperature: found {run.cache.temperature:g} with align, expected 1; chunks have no likelihood else"
        )
    if run.tune is not None and run.tune.cache == "own":
        raise ValueError("tune.cache: found own with align, expected none; an aligned cache holds no conversations")
    if run.makes("student") and run.student.prune is not None:
        raise ValueError("student.prune: found with align, expected path or model; pruning keeps the tokenizer")
    if run.makes("eval") and (run.eval.teacher == "live" or run.eval.speculative is not None):
        name = "teacher" if run.eval.teacher == "live" else "speculative"
        raise ValueError(f"eval.{name}: found with align, expected none; the student has another tokenizer")


def _require_text(run: RunSections, section: str) -> None:
    if run.makes(section) and not (run.has("corpus") or run.has("cache")):
        raise ValueError(f"{section}: found without corpus and cache, expected {_given('cache')} beside it")


def _require_rounds(run: RunSections) -> None:
    """Raise ValueError for sections that rounds need and that are missing, and for settings that contradict rounds."""
    rounds = run.rounds
    if rounds is None:
        return
    if run.align is not None:
        raise ValueError("rounds: found with align, expected one of them; writer and scorer must share a tokenizer")
    if "cache" in run.reuse:
        raise ValueError(
            "reuse.cache: found with rounds, expected none; rounds make their own caches, and train.caches adds others"
        )
    for section in ("corpus", "teacher", "cache", "student", "train"):
        if not run.has(section):
            raise ValueError(f"rounds: found without {section}, expected {_given(section)} beside it")
    if run.cache.num_heldout_sequences == 0:
        raise ValueError(
            "cache.num_heldout_sequences: found 0 with rounds, expected more: students are measured on the answers to "
            "held-out prompts"
        )
    if rounds.first_writer == "teacher" or rounds.off_policy_arms:
        setting = "first_writer" if rounds.first_writer == "teacher" else "off_policy_arms"
        _require_teacher_model(run, f"rounds.{setting}: found", "that writes")
    for arm in rounds.off_policy_arms:
        if arm not in run.arms:
            raise ValueError(f"rounds.off_policy_arms: found {arm!r}, expected some of {', '.join(sorted(run.arms))}")
    for arm in run.arms:
        for name in run.train_settings(arm).caches:
            if name.startswith("round-"):
                raise ValueError(f"train.caches: found the name {name!r} with rounds, expected another")


def _require_models(run: RunSections) -> None:
    if run.makes("teacher"):
        if not run.teacher.is_given and run.teacher.model is None:
            raise ValueError("teacher: found none of path, model and served, expected one of them")
        if run.teacher.optimization is not None and not run.has("corpus"):
            setting = "model" if run.teacher.path is None else "adapt"
            raise ValueError(f"teacher.{setting}: found without corpus, expected {_given('corpus')} to train it on")
    if run.makes("student"):
        student = run.student
        if student.path is None and student.model is None and student.prune is None:
            raise ValueError("student: found none of path, model and prune, expected one of them")
        if student.prune is not None:
            _require_teacher_model(run, "student.prune: found", "to prune")


def _require_arm(run: RunSections, arm: str) -> None:
    settings = run.train_settings(arm)
    if run.student.quantize is not None and settings.strategy == "fsdp2":
        raise ValueError(
            f"arms.{arm}.strategy: found fsdp2 with student.quantize, expected ddp; each device holds the whole student"
        )
    if settings.needs_teacher:
        _require_teacher_model(run, f"arms.{arm}.targets: found online", "to ask")
    if settings.later_learning_rate is not None and run.rounds is None:
        raise ValueError(f"arms.{arm}.later_learning_rate: found without rounds, expected a section rounds beside it")
    if settings.divergence == "policy_gradient":
        _require_written(run, f"arms.{arm}.divergence: found policy_gradient")
    if run.makes("align"):
        require_chunks(f"arms.{arm}", settings)
        if settings.counted_projected_weight > 0 and not (run.align and run.align.projected_top_k):
            raise ValueError(
                f"arms.{arm}.projected_weight: found {settings.projected_weight:g} without align.projected_top_k, "
                "expected how many top-k tokens are projected beside it"
            )
    elif run.makes("cache"):
        _require_recorded(arm, settings, run.cache)


def _require_written(run: RunSections, found: str) -> None:
    """Raise ValueError unless the run has rounds whose stored logprobs are those from which the text was sampled."""
    rounds = run.rounds
    if rounds is None:
        raise ValueError(f"{found} without rounds, expected them: text that students wrote, with their logprobs")
    if (rounds.temperature, rounds.top_p) != (1, 1):
        raise ValueError(
            f"{found} with rounds.temperature {rounds.temperature:g} and rounds.top_p {rounds.top_p:g}, expected 1 and "
            "1; otherwise the stored logprobs are not those by which tokens were sampled"
        )
    if run.cache.temperature != 1:
        raise ValueError(f"{found} with cache.temperature {run.cache.temperature:g}, expected 1")


def require_chunks(where: str, settings: TrainSettings) -> None:
    """Raise ValueError for settings that the loss of an aligned cache does not support; `where` names the settings."""
    if settings.recording not in (None, "chunks"):
        raise ValueError(f"{where}.recording: found {settings.recording} with an aligned cache, expected chunks")
    if settings.needs_teacher:
        raise ValueError(f"{where}.targets: found online with an aligned cache, expected cache; the tokenizers differ")
    if not settings.needs_targets:
        return
    if settings.divergence == "jsd":
        raise ValueError(f"{where}.divergence: found jsd with chunks, expected forward_kl or reverse_kl")
    if settings.tail is not None:
        raise ValueError(f"{where}.tail: found {settings.tail} with chunks, expected none; a chunk has no tail")
    if settings.token_weights != "equal":
        raise ValueError(f"{where}.token_weights: found {settings.token_weights} with chunks, expected equal")


def _require_recorded(arm: str, settings: TrainSettings, cache: CacheSettings) -> None:
    """Raise ValueError if an arm needs something of the run's own cache that the cache will not hold."""
    where = f"arms.{arm}"
    if settings.counted_projected_weight > 0:
        raise ValueError(
            f"{where}.projected_weight: found {settings.projected_weight:g} without align, expected an aligned cache"
        )
    recording = settings.recording
    if recording is not None and recording not in cache.recordings:
        raise ValueError(
            f"{where}.recording: found {recording}, expected {' or '.join(cache.recordings)}, which is what "
            "cache.recording keeps"
        )
    if not settings.needs_targets:
        return
    if recording is None and len(cache.recordings) > 1:
        raise ValueError(f"{where}.recording: found none named, expected one of {', '.join(cache.recordings)}")
    recording = recording or cache.recordings[0]
    fix = "set cache.recording to topk, or leave the setting out"
    # policy_gradient is checked as forward_kl: it needs only the teacher's logprob of the token, which every recording
    # has, and learns the teacher's text by forward KL
    divergence = "forward_kl" if settings.divergence == "policy_gradient" else settings.divergence
    divergences = [one for known, one in SUPPORTED_TAILS if known == recording]
    tails = SUPPORTED_TAILS.get((recording, divergence), ())
    if divergence not in divergences:
        raise ValueError(
            f"{where}.divergence: found {settings.divergence} with a {recording} cache, expected "
            f"{' or '.join(divergences)}; {fix}"
        )
    if settings.tail is not None and settings.tail not in tails:
        raise ValueError(
            f"{where}.tail: found {settings.tail} with {settings.divergence} and a {recording} cache, expected "
            f"{' or '.join(tails)}; {fix}"
        )
    if recording == "sampled" and settings.token_weights != "equal":
        raise ValueError(
            f"{where}.token_weights: found {settings.token_weights} with a sampled cache, expected equal; {fix}"
        )
    known = (cache.temperature, *(cache.extra_temperatures if recording == "topk" else ()))
    if settings.temperature is not None and settings.temperature not in known:
        expected = " or ".join(f"{one:g}" for one in sorted(known))
        fix = "add it to cache.extra_temperatures" if recording == "topk" else "a topk cache can have several"
        raise ValueError(
            f"{where}.temperature: found {settings.temperature:g}, expected {expected}, at which the cache is to be "
            f"made; {fix}"
        )


def _require_tune(run: RunSections) -> None:
    if run.tune is None:
        return
    if run.tune.path is None and not run.has("train"):
        raise ValueError("tune: found without train and without tune.path, expected one of them: a model to tune")
    if run.tune.cache == "own" and not run.has("cache"):
        raise ValueError(f"tune.cache: found own without a cache, expected {_given('cache')} beside it")


def _require_eval(run: RunSections) -> None:
    if not run.makes("eval"):
        return
    _require_text(run, "eval")
    if not run.has("train") and not run.has_teacher_model:
        raise ValueError("eval: found no model to measure, expected a section train or teacher beside it")
    live = "eval.teacher" if run.eval.teacher == "live" else "eval.speculative" if run.eval.speculative else None
    if live is not None:
        _require_teacher_model(run, f"{live}: found", "to measure")
