"""A teacher behind an endpoint: its rows are the teacher's own, and an answer that is not its tokens' is no row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from teacher_server import KEY, MODEL, listed, refused
from transformers import LlamaForCausalLM

from capgap.pipeline.cache.scoring import Request
from capgap.pipeline.cache.server_engine import SERVER_DTYPE, ServerEngine
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.schemas.errors import CapgapError, InputError, MachineError, MismatchError, SettingError
from capgap.schemas.run_endpoint import EndpointSettings

VOCAB_SIZE, SEQ_LEN, TOP_K = 300, 48, 16

# Both compute in float32, the one sequence by sequence and the other in batches. Measured: 1.2e-6.
TOLERANCE_NATS = 1e-4

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(teacher_folder) -> str:
    folder = teacher_folder(num_columns=VOCAB_SIZE)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: str) -> None:
    from tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def engine(server, recording) -> Callable[..., ServerEngine]:
    def make(top_k: int = TOP_K, vocab_size: int = VOCAB_SIZE, model: str = MODEL, **settings: Any) -> ServerEngine:
        given = EndpointSettings(**{"base_url": server.url, "num_retries": 0, **settings})
        return ServerEngine(given, model, recording("topk", top_k, vocab_size=vocab_size), SEQ_LEN)

    return make


@pytest.mark.parametrize("top_k", [TOP_K, 1, 64])
def test_its_rows_are_those_of_the_teacher_here(engine, folder, recording, requests_of, top_k: int) -> None:
    requests = [*requests_of(5), *(Request(one.tokens_L1[: 2 + 9 * i]) for i, one in enumerate(requests_of(3)))]
    served = engine(top_k)
    assert (served.name, served.dtype) == (f"server {MODEL} (/m)", SERVER_DTYPE)
    reference = TransformersEngine(folder, recording("topk", top_k), "float32", 100, "cpu")
    for found, wanted in zip(served.score(requests), reference.score(requests), strict=True):
        assert (found.ids_LK == wanted.ids_LK).all()
        for name in ("logprobs_LK", "label_logprobs_L", "tail_L"):
            assert np.abs(getattr(found, name) - getattr(wanted, name)).max() < TOLERANCE_NATS, name
        assert found.samples_Ln.shape[1] == found.log_tails_LT.shape[1] == 0


def test_no_more_requests_are_under_way_than_were_asked_for(engine, server, requests_of) -> None:
    together = threading.Barrier(3)

    def wait(answer: Any, body: Any, number: int) -> Any:
        together.wait(timeout=60)  # three at once there are: a fourth would break the count below
        return answer

    server.change = wait
    assert len(engine(num_parallel=3).score(requests_of(9))) == 9
    assert server.most_at_once == 3


def test_a_server_that_is_busy_for_a_while_is_asked_again_and_the_rows_are_the_same(
    engine, server, requests_of
) -> None:
    wanted = engine().score(requests_of(3))
    asked = len(server.asked)
    server.change = lambda answer, body, number: refused("busy", 503) if number < asked + 2 else answer
    found = engine(num_retries=3).score(requests_of(3))
    assert len(server.asked) == asked + 5
    for one, other in zip(found, wanted, strict=True):
        assert (one.ids_LK == other.ids_LK).all() and (one.logprobs_LK == other.logprobs_LK).all()


def _cut(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = choice["prompt_logprobs"][:-1]


def _cut_and_said(choice: dict[str, Any]) -> None:
    _cut(choice)
    choice["prompt_token_ids"] = choice["prompt_token_ids"][:-1]


def _other_prompt(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = choice["prompt_token_ids"][::-1]


def _shifted(choice: dict[str, Any]) -> None:
    del choice["prompt_token_ids"]
    first, second, *rest = choice["prompt_logprobs"]
    choice["prompt_logprobs"] = [first, *rest, second]


def _without(choice: dict[str, Any]) -> None:
    del choice["prompt_logprobs"]


def _from_a_cache(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][1:4] = [None] * 3


def _fewer(choice: dict[str, Any]) -> None:
    for row in choice["prompt_logprobs"][1:]:
        row.pop(list(row)[-1])


def _as_logits(choice: dict[str, Any]) -> None:
    for row in choice["prompt_logprobs"][1:]:
        for one in row.values():
            one["logprob"] += 9.0


def _as_text(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [None, *({"a": one} for one in choice["prompt_logprobs"][1:])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_cut, "found rows of 48 tokens, expected rows of the 49 tokens"),
        (_cut_and_said, "found rows of 48 tokens, expected rows of the 49 tokens that were sent"),
        (_other_prompt, "found rows of other tokens"),
        (_shifted, "rows contain their token, expected all of them; the first row that does not is row"),
        (_without, "answers without prompt_logprobs; found a choice of finish_reason, index"),
        (_from_a_cache, "found tokens without logprobs"),
        (_fewer, f"ids for a token, expected the top {TOP_K} and the token itself"),
        (_as_logits, "expected at most 1; start the server without --logprobs-mode"),
    ],
)
def test_an_answer_that_is_not_that_of_its_tokens_is_no_row(
    engine, server, requests_of, change: Change, said: str
) -> None:
    def changed(answer: Any, body: Any, number: int) -> Any:
        change(answer.body["choices"][0])
        return answer

    server.change = changed
    with pytest.raises(InputError, match=said) as raised:
        engine().score(requests_of(2))
    assert "\n" not in str(raised.value) and "ask " in str(raised.value)


def test_answers_that_were_mixed_up_are_told_apart(engine, server, requests_of) -> None:
    kept: list[Any] = []

    def mixed(answer: Any, body: Any, number: int) -> Any:
        del answer.body["choices"][0]["prompt_token_ids"]
        kept.append(answer)
        return kept[0]

    server.change = mixed
    with pytest.raises(InputError, match="rows contain their token"):
        engine(num_parallel=1).score(requests_of(2))


def test_an_answer_of_another_form_is_named(engine, server, requests_of) -> None:
    def text(answer: Any, body: Any, number: int) -> Any:
        _as_text(answer.body["choices"][0])
        return answer

    server.change = text
    with pytest.raises(MachineError, match="does not answer in OpenAI's form"):
        engine().score(requests_of(1))


def _busy(answer: Any, body: Any, number: int) -> Any:
    return refused("try later", 429)


def _wrong_key(answer: Any, body: Any, number: int) -> Any:
    return refused(f"Incorrect API key provided: {KEY}", 401)


def _too_long(answer: Any, body: Any, number: int) -> Any:
    return refused("This model's maximum context length is 48 tokens.")


def _other_model(answer: Any, body: Any, number: int) -> Any:
    answer.body["model"] = "another"
    return answer


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (_busy, MachineError, "the teacher's server's rate limit is reached.*lower cache.server.num_parallel"),
        (_wrong_key, SettingError, r"does not take the key.*\[key\].*put another into OPENAI_API_KEY"),
        (_too_long, InputError, "refuses the request.*maximum context length.*--max-model-len 50"),
        (_other_model, MismatchError, "comes from another model.*found another, expected tiny-teacher"),
    ],
)
def test_what_a_server_refuses_is_said_with_the_fix(
    engine, server, requests_of, change: Any, kind: type[CapgapError], said: str
) -> None:
    server.change = change
    with pytest.raises(kind, match=said) as raised:
        engine().score(requests_of(2))
    assert KEY not in str(raised.value)


def test_a_server_that_does_not_answer_in_time_is_given_up(engine, server, requests_of) -> None:
    done = threading.Event()

    def slow(answer: Any, body: Any, number: int) -> Any:
        done.wait(60)
        return answer

    server.change = slow
    try:
        with pytest.raises(MachineError, match=r"does not answer in time; found 1 requests of up to 0\.2 s; raise"):
            engine(timeout_s=0.2).score(requests_of(2))
    finally:
        done.set()


def test_fewer_logprobs_than_are_to_be_kept_are_named_with_the_flag(engine, server, requests_of) -> None:
    server.max_logprobs = 8
    with pytest.raises(SettingError, match=r"cache.top_k: the server allows fewer logprobs; .* --max-logprobs 16"):
        engine().score(requests_of(1))


def test_a_server_of_other_models_or_of_shorter_sequences_is_refused_at_once(engine, server) -> None:
    server.models = listed("another")
    with pytest.raises(SettingError, match="does not serve this teacher; found another, expected tiny-teacher"):
        engine()
    server.models = listed(longest=SEQ_LEN + 1)
    with pytest.raises(SettingError, match=f"--max-model-len {SEQ_LEN + 2} or more.*lower corpus.seq_len to 47"):
        engine()
    server.models = refused("not found", 404)
    assert engine().name == f"server {MODEL}"
    assert server.asked == []


def test_nobody_at_the_address_is_one_line(engine) -> None:
    with pytest.raises(MachineError, match=r"the teacher's server cannot be reached; .*; start it"):
        engine(base_url="http://127.0.0.1:1/v1")


def test_ids_that_no_token_has_are_refused(engine, requests_of) -> None:
    cut = [Request(one.tokens_L1 % 200) for one in requests_of(3)]
    with pytest.raises(InputError, match=r"outside the vocabulary; found 2.., expected 0 to 199"):
        engine(vocab_size=200).score(cut)


def test_logits_of_16_bits_are_said_once(engine, folder, server, requests_of, caplog) -> None:
    exact = engine()
    exact.score(requests_of(2))
    assert "logits are of few bits" not in caplog.text
    model = LlamaForCausalLM.from_pretrained(folder)

    def rounded(answer: Any, body: Any, number: int) -> Any:
        with torch.inference_mode():
            logits_LV = model(torch.tensor([body["prompt"]])).logits[0].bfloat16().float()
        logprobs_LV = torch.log_softmax(logits_LV, -1)
        for logprobs_V, row in zip(logprobs_LV, answer.body["choices"][0]["prompt_logprobs"][1:], strict=False):
            for one in row:
                row[one]["logprob"] = float(logprobs_V[int(one)])
        return answer

    server.change = rounded
    engine = engine(top_k=64)
    engine.score(requests_of(2))
    engine.score(requests_of(2))
    assert caplog.text.count("logits are of few bits") == 1
    assert '--hf-overrides \'{"head_dtype": "float32"}\'' in caplog.text


def test_a_fault_ends_the_submission_without_asking_for_all_of_it(engine, server, requests_of) -> None:
    server.change = lambda answer, body, number: refused("broken", 500)
    began = time.monotonic()
    with pytest.raises(MachineError, match="the teacher's server fails"):
        engine(num_parallel=2).score(requests_of(200))
    assert len(server.asked) < 200
    assert time.monotonic() - began < 60


def test_what_is_to_be_kept_is_of_the_vocabulary(engine) -> None:
    with pytest.raises(SettingError, match="more ids than the vocabulary has"):
        engine(top_k=VOCAB_SIZE + 1)


def test_ids_of_a_text_are_those_of_the_server_s_tokenizer(engine, server) -> None:
    from tiny_models import tiny_tokenizer

    served = engine()
    assert served.ids_of("a text that is long") == tiny_tokenizer().encode("a text that is long")
    server.change = lambda answer, body, number: refused("no tokenizer")
    assert served.ids_of("a text") is None
