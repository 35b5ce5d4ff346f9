from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from judge_runs import MAX_TOKENS, QUESTIONS, finish_models, settings, tiny_model, tokenizer

from capgap.pipeline.answers.chat import Chat, stop_ids
from capgap.pipeline.answers.generators import BATCH_QUESTIONS, TransformersGenerator
from capgap.pipeline.answers.kept import read_answers
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.judge_results import Answered, Question
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_judge import AnswerSettings

TEACHER = Instance("answers", arm="teacher")
STUDENT = Instance("answers", arm="distilled", seed=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose models are made."""
    folder = tmp_path_factory.mktemp("models")
    finish_models(RunFile.model_validate(settings(folder, {})))
    return folder


@pytest.fixture
def make_run(models: Path, tmp_path: Path):
    shutil.copytree(models / "out", tmp_path / "out")

    def make(**answers: Any) -> RunFile:
        return RunFile.model_validate(settings(tmp_path, {"answers": answers}))

    return make


def answers_of(run: RunFile, instance: Instance = TEACHER) -> tuple[Answered, ...]:
    return read_answers(Path(run.out) / instance.name / "answers.jsonl")


def test_both_turns_are_answered_in_the_order_of_the_questions(make_run) -> None:
    run = make_run()
    manifest = carry_out(run, TEACHER)
    found = answers_of(run)
    assert [one.question.question_id for one in found] == [question["question_id"] for question in QUESTIONS]
    assert [one.temperature for one in found] == [0.7, 0.0, 0.7]  # writing, math, and a category of one's own
    assert found[1].question.reference == ("12", "15")
    replies = [reply for one in found for reply in one.replies]
    assert all(reply.finish in ("stop", "length") and reply.num_tokens <= MAX_TOKENS for reply in replies)
    assert manifest.totals["questions"] == len(QUESTIONS)
    assert manifest.totals["tokens"] == sum(reply.num_tokens for reply in replies)
    (source,) = manifest.sources
    assert source.path.endswith("questions.jsonl")


def test_answers_at_a_seed_come_out_again_and_at_another_they_do_not(make_run) -> None:
    run, other = make_run(), make_run(seed=1)
    first = carry_out(run, TEACHER).content
    assert carry_out(run, TEACHER, remake=True).content == first
    assert states(other)["answers/teacher"].why == "judge.answers.seed was 0, is 1"
    assert carry_out(other, TEACHER).content != first


def test_each_model_gives_answers_of_its_own(make_run) -> None:
    run = make_run()
    carry_out(run, TEACHER)
    carry_out(run, STUDENT)
    assert [one.replies for one in answers_of(run)] != [one.replies for one in answers_of(run, STUDENT)]


def test_the_second_answer_continues_the_conversation(make_run, models: Path) -> None:
    run = make_run(temperatures={"writing": 0.0})
    carry_out(run, TEACHER)
    (writing, *_) = answers_of(run)
    words = tokenizer()
    asked, first, again = writing.question.turns[0], writing.replies[0].text, writing.question.turns[1]
    text = f"<user>{asked}</user><assistant>{first}</assistant><user>{again}</user><assistant>"
    folder = str(models / "out" / "teacher" / "model")
    generator = TransformersGenerator(folder, [words.eos_token_id], "cpu", "auto")
    chat = Chat(
        words, folder, AnswerSettings(max_tokens=MAX_TOKENS, temperatures={}, temperature=0), 256, [writing.question]
    )
    prompt = chat.prompt(writing.question, [first])
    assert prompt is not None and words.decode(prompt.ids) == text
    assert chat.reply(*generator.generate([prompt])) == writing.replies[1]


def test_a_changed_question_makes_the_answers_stale(make_run, tmp_path: Path) -> None:
    run = make_run()
    carry_out(run, TEACHER)
    path = tmp_path / "questions.jsonl"
    path.write_text(path.read_text().replace("tea", "soup"))
    state = states(run)["answers/teacher"]
    assert (state.state, state.why) == (State.STALE, f"source {path} changed")


def test_a_killed_stage_answers_the_batches_that_are_missing_and_ends_alike(make_run, tmp_path: Path) -> None:
    run = make_run(max_tokens=2)
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "category": "c", "turns": [f"{i}?", "Why?"]} for i in range(BATCH_QUESTIONS + 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = carry_out(run, TEACHER).content
    expected = answers_of(run)
    folder = tmp_path / "out" / "answers" / "teacher"
    # as it was before the last batch: the first one is kept, with a mark by which it is known
    (folder / "manifest.json").unlink()
    (folder / "work" / "batches").mkdir(parents=True)
    kept = [one.model_copy(update={"temperature": 1.5}) for one in expected[:BATCH_QUESTIONS]]
    (folder / "work" / "batches" / "0000.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in kept))
    (folder / "answers.jsonl").unlink()
    assert states(run)["answers/teacher"].state is State.PARTIAL
    assert carry_out(run, TEACHER).content != whole
    assert answers_of(run) == (*kept, *expected[BATCH_QUESTIONS:])


def test_a_device_that_another_stage_holds_is_not_answered_on(make_run) -> None:
    with leases(["cpu"], "another run", wait=False), pytest.raises(MachineError, match="another run"):
        carry_out(make_run(), TEACHER, wait=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, r"the tokenizer has no chat template; expected a chat template.*leave judge out"),
        ("{{ raise_exception('no user here') }}", r"the chat template cannot be used; found no user here"),
        ("{% for", r"the chat template cannot be read"),
    ],
)
def test_a_chat_template_that_is_missing_or_broken_is_named(tmp_path: Path, template: str | None, said: str) -> None:
    run = RunFile.model_validate(settings(tmp_path, {}))
    finish_models(run, template)
    with pytest.raises(InputError, match=said):
        carry_out(run, TEACHER)


def test_an_answer_is_cut_where_the_model_s_positions_end_and_there_may_be_no_room_for_the_second(
    tmp_path: Path,
) -> None:
    positions = 40
    run = RunFile.model_validate(settings(tmp_path, {"answers": {"max_tokens": 64}}))
    finish_models(run, positions=positions)
    carry_out(run, TEACHER)
    for one in answers_of(run):
        first, second = one.replies
        assert first.finish == "length" and 0 < first.num_tokens < 64
        assert (second.finish, second.text, second.num_tokens) == ("no_room", "", 0)


def test_every_end_of_a_turn_that_a_model_s_folder_names_ends_an_answer(tmp_path: Path) -> None:
    words = tokenizer()
    model = tiny_model(1)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    question = Question.model_validate(QUESTIONS[0])
    chat = Chat(words, str(tmp_path), AnswerSettings(), None, [question])
    assert chat.stop_ids == tuple(sorted({7, 9, words.eos_token_id}))


def test_ends_of_turns_are_found_for_an_id_of_the_hub_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    kept = tmp_path / "models--org--tiny"
    for name, text in {
        "refs/main": commit,
        f"snapshots/{commit}/config.json": "{}",
        f"snapshots/{commit}/generation_config.json": json.dumps({"eos_token_id": [7, 9]}),
    }.items():
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_text(text)
    words = tokenizer()
    assert stop_ids(words, "org/tiny") == tuple(sorted({7, 9, words.eos_token_id}))
    (kept / "snapshots" / commit / "generation_config.json").unlink()
    assert stop_ids(words, "org/tiny") == (words.eos_token_id,)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "end"}'])
def test_a_generation_config_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=f"^{tmp_path}: generation_config.json cannot be used; found"):
        stop_ids(tokenizer(), str(tmp_path))


def test_a_special_token_in_a_question_or_an_answer_is_text() -> None:
    words = tokenizer()
    question = Question.model_validate(QUESTIONS[0])
    says = question.model_copy(update={"turns": (f"{question.turns[0]} {words.eos_token}", *question.turns[1:])})
    found = []
    for asked, answer in ((question, "12"), (says, f"12 {words.eos_token}")):
        prompt = Chat(words, "here", AnswerSettings(), 512, [asked]).prompt(asked, [answer])
        assert prompt is not None
        found.append(prompt.ids.count(words.eos_token_id))
    # those of the template are there, and no others
    assert found[0] == found[1]


def test_a_question_draws_alike_whatever_else_is_asked() -> None:
    first, second, third = (Question.model_validate(question) for question in QUESTIONS)
    seeds = {}
    for asked in ([first, second], [second], [third, second, first]):
        chat = Chat(tokenizer(), "here", AnswerSettings(), 512, asked)
        prompt = chat.prompt(second, [])
        assert prompt is not None
        seeds[len(asked)] = prompt.seed
    assert len(set(seeds.values())) == 1
    prompts = [chat.prompt(second, before) for before in ([], ["12"])]
    assert len({prompt.seed for prompt in prompts if prompt}) == 2
