"""A template is a stranger's program: what it writes is what transformers writes, and it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.chat_template import NUM_STEPS, ChatTemplate, default_template
from capgap.schemas.errors import BadRecordError, InputError

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "3 + 4?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": [3, "\u00fc"]}}}],
    },
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "<think>x</think>7"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
# what real templates do: namespaces, slices, loop controls, macros, filters, tests, methods, tools, marks
USUAL = """\
{%- macro call(one) %}{{ one.function.name ~ '(' ~ one.function.arguments | tojson ~ ')' }}{% endmacro %}
{%- set ns = namespace(last=-1, seen=[]) %}{% set date = strftime_now('%Y') if false else '2024' %}
{{- bos_token }}{% if tools is defined and tools %}
{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% endif %}
{%- for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}
{%- if ns.last < 0 and message.role == 'user' and message['content'] is string %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages %}
{%- if message.role not in ['user', 'assistant', 'tool'] %}{{ raise_exception('no ' + message.role) }}{% endif %}
<{{ message.role }}{{ '!' if loop.first }}{{ '.' if loop.last }}{{ loop.index0 % 2 }}>
{%- if message.role == 'assistant' %}{% generation %}{{ message.content.split('</think>')[-1].lstrip('\\n') }}
{%- for one in message.tool_calls or [] %}{{ call(one) }}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}
{{- eos_token }}{% endgeneration %}{% else %}{{ '%s|%d' % (message.content, 3) }}{% endif %}
{%- for name, value in message.items() | sort %}{{ name | upper }}{% endfor %}{{ message.content * 2 }}
{%- set ns.seen = ns.seen + [loop.index] %}{% endfor %}{{ ns.seen | join(', ') }}{{ ns.last }}{{ undefined_name }}
{%- if add_generation_prompt %}<assistant>{% endif %}{{ {'a': 1, 'b': [2, (3, 4)]} }}{{ 'x'.center(9) | indent(3) }}"""


def _tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["how much is 3 + 4 " * 9], 300)
    tokenizer.chat_template = template
    return tokenizer


def _render(template: str, messages: list[dict[str, Any]] | None = None) -> str:
    found = ChatTemplate(_tokenizer(template), "the template")
    return found.render(messages or MESSAGES[1:2], [], "a.jsonl:1", asks=True)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("tools", [[], TOOLS])
def test_a_conversation_is_written_as_transformers_writes_it(tools: list[dict[str, Any]], asks: bool) -> None:
    tokenizer = _tokenizer(USUAL)
    template = ChatTemplate(tokenizer, "it")
    for stop in range(2, len(MESSAGES) + 1):
        text, spans = template.render_marked(MESSAGES[:stop], tools, "x", asks)
        given = {"tools": tools or None, "add_generation_prompt": asks}
        assert text == tokenizer.apply_chat_template(MESSAGES[:stop], tokenize=False, **given)
        assert text == template.render(MESSAGES[:stop], tools, "x", asks)
        assert [text[start:end].endswith("<|endoftext|>") for start, end in spans] == [True] * len(spans)
        assert len(spans) == sum(message["role"] == "assistant" for message in MESSAGES[:stop])


DOUBLING = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x | tojson }}"
)
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}.{% endfor %}"
    "{% endfor %}{% endfor %}",
    "calls": "{% for a in range(99999) %}{% for b in range(99999) %}{{ range(9) | map('string') | list | length }}"
    "{% endfor %}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "sum": DOUBLING % ("'a'", "ns.x + ns.x"),
    "concatenation": DOUBLING % ("'a'", "ns.x ~ ns.x"),
    "product": DOUBLING % ("'a'", "ns.x * 2"),
    "format": DOUBLING % ("'a'", "'%s%s' % (ns.x, ns.x)"),
    "method format": DOUBLING % ("'a'", "'{0}{0}'.format(ns.x)"),
    "filter": DOUBLING % ("'a'", "ns.x | replace('a', 'aa')"),
    "method": DOUBLING % ("'a'", "ns.x.replace('a', 'aa')"),
    "join": DOUBLING % ("'a'", "[ns.x, ns.x] | join"),
    "list": DOUBLING % ("['a']", "[ns.x, ns.x]"),
    "object": DOUBLING % ("{}", "{'a': ns.x, 'b': ns.x}"),
    "block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "width": "{{ '%9999999999d' % 1 }}",
    "star": "{{ '%*d' % (9999999999, 1) }}",
    "method width": "{{ '{:>9999999999}'.format(1) }}",
    "times": "{{ 'a' * 10 ** 12 }}",
    "times list": "{{ 10 ** 12 * [1] }}",
    "center": "{{ 'a'.center(10 ** 12) }}",
    "filter center": "{{ 'a' | center(10 ** 12) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 12) }}",
    "separator": "{{ range(100000) | join('x' * 1000000) }}",
    "objects": "{{ dict.fromkeys(range(100000), 'x' * 1000000) | tojson }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_ended_by_its_bound(name: str) -> None:
    with pytest.raises(InputError, match="the template: the chat template does not end; found") as caught:
        _render(ENDLESS[name])
    assert not isinstance(caught.value, BadRecordError), "it is no fault of the record"


def test_the_bound_is_a_count_and_grows_with_the_conversation() -> None:
    turns = "{% for a in range(99999) %}{% for b in range(N) %}{% endfor %}{% endfor %}done"
    # a turn of the outer loop is itself a step, and its call of `range` ten
    num_turns = NUM_STEPS // 99999 - 10
    fits, not_quite = (turns.replace("N", str(number)) for number in (num_turns - 2, num_turns + 2))
    assert _render(fits) == "done"
    with pytest.raises(InputError, match="more than 10,00"):
        _render(not_quite)
    assert _render(not_quite, [{"role": "user", "content": "x" * 10_000}]) == "done"


def test_of_several_templates_the_default_one_is_taken_or_the_lack_of_it_is_said() -> None:
    several: Any = {"tool_use": "tools", "default": "words"}
    template = default_template(_tokenizer(several), "the template")
    assert template.render(MESSAGES, [], "x") == "words"
    assert default_template(_tokenizer("one"), "the template").render(MESSAGES, [], "x") == "one"
    without: Any = {"tool_use": "tools", "rag": "found"}
    message = "the template: none of the chat templates is the default; found 'rag', 'tool_use', expected one"
    with pytest.raises(InputError, match=message):
        default_template(_tokenizer(without), "the template")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "cannot be read; found Expected an expression"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be read; found maximum recursion"),
        ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "cannot be read; found too many statically nested"),
        ("{{ x | nothing }}", "cannot be read; found No filter named"),
        (None, "there is no single chat template; found no chat template"),
        ({"default": "x"}, "there is no single chat template; found several"),
    ],
)
def test_what_is_no_template_is_refused(template: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"the template: .*{message}"):
        ChatTemplate(_tokenizer(template), "the template")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}", "{{ messages[9].role }}", "{{ 1 / 0 }}", "{{ messages[0].content + 3 }}",
        "{{ [].append(1) }}", "{{ {}.a.b }}", "{{ range(10 ** 9) }}", "{{ 2 ** 99999 }}",
    ],
)  # fmt: skip
def test_whatever_a_template_raises_is_how_it_refuses_the_conversation(template: str) -> None:
    with pytest.raises(BadRecordError, match=r"a.jsonl:1: the chat template refuses the conversation; found"):
        _render(template)


def test_a_template_sees_nothing_of_python() -> None:
    for probe in ("messages.__class__", "''.__class__.__mro__", "raise_exception.__globals__"):
        with pytest.raises(BadRecordError):
            _render("{{ " + probe + ".x }}")


def test_definitions_of_tools_reach_the_template() -> None:
    template = ChatTemplate(_tokenizer("{{ tools | tojson }}"), "it")
    assert template.knows_tools and json.loads(template.render(MESSAGES, TOOLS, "x")) == TOOLS
    assert template.render(MESSAGES, [], "x") == "null"


IN_A_LOOP = (
    "{% for m in messages %}BEFORE[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}!"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\nAFTER{% endfor %}"
)
PLACES = {
    "macro": ("{% macro turn() %}", "{% endmacro %}{{ turn() }}"),
    "filter": ("{% filter trim %}", "{% endfilter %}"),
    "set": ("{% set text %}", "{% endset %}{{ text }}"),
    "call": ("{% macro around() %}{{ caller() }}{% endmacro %}{% call around() %}", "{% endcall %}"),
}


@pytest.mark.parametrize("name", PLACES)
def test_marks_whose_place_in_the_text_is_not_known_are_refused_and_the_text_itself_is_written(name: str) -> None:
    before, after = PLACES[name]
    template = ChatTemplate(_tokenizer(IN_A_LOOP.replace("BEFORE", before).replace("AFTER", after)), "it")
    talk = [*MESSAGES[1:2], {"role": "assistant", "content": "7, and 7."}]
    assert template.render(talk, [], "x").startswith("[user] 3 + 4?")
    said = r"it: the chat template marks answers within a macro, .* in the place of '7, and 7\.!'"
    with pytest.raises(InputError, match=said) as caught:
        template.render_marked(talk, [], "x")
    assert not isinstance(caught.value, BadRecordError), "it is no fault of the record"


def test_marks_with_which_a_macro_begins_have_their_place() -> None:
    source = (
        "{% macro answer(m) %}{% generation %}{{ m.content }}!{% endgeneration %}\n{% endmacro %}"
        "{% for m in messages %}[{{ m.role }}] {{ answer(m) }}{% endfor %}"
    )
    text, spans = ChatTemplate(_tokenizer(source), "it").render_marked(MESSAGES[:2], [], "x")
    assert [text[start:end] for start, end in spans] == [" Be brief. !", "3 + 4?!"]
