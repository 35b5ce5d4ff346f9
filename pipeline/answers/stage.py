"""The answers stage: one model of the run answers both turns of every question.

Questions go to the model in batches whose members are fixed: first all first turns of a batch, then all second turns. A
batch is answered as a whole or not at all, so a stage that was killed and restarted ends with the same answers as one
that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from capgap.pipeline.answers.chat import Chat, require_template
from capgap.pipeline.answers.generators import BATCH_QUESTIONS, Generator, TransformersGenerator, VllmGenerator
from capgap.pipeline.answers.kept import read_answers, write_answers
from capgap.pipeline.answers.questions import read_questions
from capgap.pipeline.models.load import model_path
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.stage.progress import progress
from capgap.schemas.facts import ModelFacts
from capgap.schemas.judge_results import ANSWERS_NAME, NUM_TURNS, Answered, Question, Reply
from capgap.schemas.run_file import RunFile

_BATCHES_FOLDER = "batches"
_NO_ROOM = Reply(text="", num_tokens=0, finish="no_room")


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse errors that can be found before a model is loaded.

    Raises:
        InputError: the questions cannot be read, or the model's tokenizer has no chat template.
    """
    assert run.judge is not None
    read_questions(run.judge.questions)
    (made,) = inputs.values()
    path = model_path(made)
    require_template(load_tokenizer(path, _trusts(run, instance)).chat_template, path)


def run(context: StageContext) -> StageResult:
    """Answer the questions that have no answer yet, and write `answers.jsonl`.

    Raises:
        InputError: the questions cannot be read, or the tokenizer's chat template cannot be used.
        MachineError: vLLM is not installed, or fails.
    """
    settings = context.run.judge
    assert settings is not None
    (made,) = context.inputs.values()
    questions = read_questions(settings.questions)
    trusts = _trusts(context.run, context.instance)
    path = model_path(made)
    tokenizer = load_tokenizer(path, trusts)
    facts = ModelFacts.model_validate(made.manifest.facts)
    chat = Chat(tokenizer, path, settings.answers, facts.max_positions, questions)
    batches = [questions[start : start + BATCH_QUESTIONS] for start in range(0, len(questions), BATCH_QUESTIONS)]
    folder = context.folder / WORK_FOLDER / _BATCHES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    plan_units(context.folder / WORK_FOLDER, "batches of questions", len(batches), f"{_BATCHES_FOLDER}/*.jsonl")
    missing = [number for number in range(len(batches)) if not _path(folder, number).is_file()]
    with progress("answers", len(batches), "batches", len(batches) - len(missing)) as meter:
        if missing:
            generator = _start(context, chat, path, trusts)
            try:
                for number in missing:
                    answered = _answer(batches[number], chat, generator)
                    write_answers(_path(folder, number), answered)
                    num_tokens = sum(reply.num_tokens for one in answered for reply in one.replies)
                    meter.advance(1, num_tokens)
            finally:
                generator.close()
    everything = [one for number in range(len(batches)) for one in read_answers(_path(folder, number))]
    write_answers(context.folder / ANSWERS_NAME, everything)
    replies = [reply for one in everything for reply in one.replies]
    totals = {
        "questions": len(questions),
        "tokens": sum(reply.num_tokens for reply in replies),
        "not_ended": sum(reply.finish != "stop" for reply in replies),
    }
    return StageResult(totals=totals)


def _answer(questions: Sequence[Question], chat: Chat, generator: Generator) -> list[Answered]:
    """Answer a batch of questions: first all first turns, then all second turns."""
    replies: list[list[Reply]] = [[] for _ in questions]
    for _ in range(NUM_TURNS):
        prompts = [
            chat.prompt(question, [reply.text for reply in before])
            for question, before in zip(questions, replies, strict=True)
        ]
        made = iter(generator.generate([prompt for prompt in prompts if prompt is not None]))
        for before, prompt in zip(replies, prompts, strict=True):
            before.append(_NO_ROOM if prompt is None else chat.reply(next(made)))
    return [
        Answered(question=question, temperature=chat.temperature_of(question), replies=(first, second))
        for question, (first, second) in zip(questions, replies, strict=True)
    ]


def _start(context: StageContext, chat: Chat, path: str, trust_remote_code: bool) -> Generator:
    assert context.run.judge is not None
    settings = context.run.judge.answers
    if settings.engine == "transformers":
        return TransformersGenerator(path, chat.stop_ids, context.device, settings.dtype, trust_remote_code)
    return VllmGenerator(
        path,
        chat.stop_ids,
        chat.length,
        context.device,
        settings.dtype,
        settings.gpu_memory_fraction,
        trust_remote_code,
    )


def _trusts(run: RunFile, instance: Instance) -> bool:
    made_from = run.teacher if instance.seed is None else run.student
    return made_from.trust_remote_code


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.jsonl"
