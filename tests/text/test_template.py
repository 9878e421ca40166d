"""Rendering: the built-in template, templates from files, and both engines against each other."""

from __future__ import annotations

import functools
import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2lite.errors import BadModelError, UsageError
from m2lite.text import m2_template
from m2lite.text.jinja import InChild, InProcess, RenderError, without_generation
from m2lite.text.template import Template, load_template
from tests.text.rendered import rendered

# What MiniMax-M2's own template renders under jinja2; the text is expected, not computed, here.
CHATS = json.loads((Path(__file__).parent / "m2_chats.json").read_text())
CHATML = """{%- for m in messages -%}
{%- if loop.first and m.role != 'system' %}{{ bos_token }}<|im_start|>system
Default<|im_end|>
{% endif %}
{%- if m.role == 'tool' and not loop.first %}{% continue %}{% endif %}
<|im_start|>{{ m['role'] | upper }}{{ '\n' + m.content | trim if m.content is string else m.content | length }}
{%- if m.tool_calls is defined %}{% for c in m.tool_calls %} {{ c.function.name }}={{ c.function.arguments | tojson }}
{%- for k in c.function.arguments.keys() | sort %} {{ loop.index }}:{{ k }}{% endfor %}{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% set ns = namespace(n=0) %}{% for m in messages | selectattr('role', 'equalto', 'user') %}
    {% set ns.n = ns.n + m.content | length %}
{% endfor %}{{ ns.n }} {{ messages[-1].role if messages else none }}
{{ (tools or []) | map(attribute='type') | join(', ') }}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
BUILTIN = InProcess(m2_template.SOURCE)
USER = [{"role": "user", "content": "Hi"}]


@functools.cache
def compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    return environment.from_string(source)


def by_jinja2(source: str, context: dict[str, Any]) -> str:
    return compiled(source).render(**context)


@pytest.mark.parametrize("chat", CHATS, ids=[chat["name"] for chat in CHATS])
def test_builtin_renders_what_m2_renders(chat: dict[str, Any]) -> None:
    template = Template(m2_template.SOURCE, "builtin")
    assert rendered(template, chat["messages"], chat["tools"], **chat["values"]) == chat["text"]


@pytest.mark.parametrize("source", [m2_template.SOURCE, CHATML], ids=["m2", "chatml"])
@pytest.mark.parametrize("chat", CHATS, ids=[chat["name"] for chat in CHATS])
def test_engines_agree(source: str, chat: dict[str, Any]) -> None:
    context = {"messages": chat["messages"], "tools": chat["tools"], "bos_token": "<s>", "add_generation_prompt": True}
    assert InProcess(source).render(json.dumps(context)) == by_jinja2(source, context)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["</think>", "\n", "{{ x }}", "]~b]"]
)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["f", "items", "get"]),
            "arguments": st.dictionaries(st.text(max_size=5), values, max_size=3),
        }
    ).map(lambda function: {"type": "function", "function": function}),
    max_size=2,
)
assistant = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words, "reasoning_content": words, "tool_calls": calls}
)
plain = st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "tool"]), "content": words})


@settings(max_examples=100, deadline=None)
@given(messages=st.lists(assistant | plain, max_size=6), system=words | st.none())
def test_engines_agree_on_anything(messages: list[dict[str, Any]], system: str | None) -> None:
    front = [] if system is None else [{"role": "system", "content": system}]
    context = {"messages": front + messages, "tools": None, "add_generation_prompt": False, "keep_reasoning": True}
    assert BUILTIN.render(json.dumps(context)) == by_jinja2(m2_template.SOURCE, context)


def test_keep_reasoning() -> None:
    messages = [*USER, {"role": "assistant", "content": "b", "reasoning_content": "why"}, *USER]
    template = Template(m2_template.SOURCE, "builtin")
    assert "why" not in rendered(template, messages)
    assert "]~b]ai\n<think>\nwhy\n</think>\n\nb[e~[" in rendered(template, messages, keep_reasoning=True)


# --- which template is used


def test_the_files_template_is_used(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    template = load_template(open_keys(bpe_keys | {"chat_template": CHATML}))
    assert (template.origin, template.warning, template.source) == ("file", None, CHATML)
    assert len(template.sha256) == 64
    assert rendered(template, USER).startswith("<|im_start|>system\nDefault")
    assert isinstance(template._engine, InChild)


def test_a_known_template_needs_no_process(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    template = load_template(open_keys(bpe_keys | {"chat_template": m2_template.SOURCE}))
    assert (template.origin, template.warning) == ("file", None)
    assert isinstance(template._engine, InProcess)


def test_builtin_on_request(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    template = load_template(open_keys(bpe_keys | {"chat_template": CHATML}), builtin=True)
    assert (template.origin, template.warning, template.source) == ("builtin", None, m2_template.SOURCE)


DOUBLE = "{% set ns = namespace(s='x') %}{% for i in range(31) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
NEST = "{% set ns = namespace(s=['x']) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
UNUSABLE = {
    "missing": (None, "has no chat template"),
    "syntax error": ("{% if %}", "cannot be used .*syntax error"),
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "out of fuel"),
    # minijinja 3 counts the length of strings as fuel, 2 does not.
    "repeated string": ("{{ 'x' * 1000000000 }}", "too large|out of fuel"),
    "doubled string": (DOUBLE + "{{ ns.s }}", "too much memory|out of fuel"),
    "doubled string, unprinted": (DOUBLE + "Good morning", "too much memory|out of fuel"),
    "wide format": ("{{ '%01000000000d' | format(1) }}", "too much memory|out of fuel"),
    "big output": ("{% for a in range(3000) %}{{ 'x' * 9999 }}{% endfor %}", "characters, limit"),
    "nested list": (NEST + "{{ ns.s }}", "too much memory|in time"),
    "nested list as JSON": (NEST + "{{ ns.s | tojson | length }}", "too much memory|in time"),
    "endless recursion": ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "recursion"),
    "deep expression": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "recursion"),
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "undefined"),
    "globals of a function": ("{{ raise_exception.__globals__['os'].system('true') }}", "undefined"),
    "init of a function": ("{{ raise_exception.__init__.__globals__ }}Good morning{{ x.y.z }}", "undefined"),
    "method of a message": ("{{ messages.__class__.__init__.__globals__ }}", "undefined|insecure"),
    "import": ("{% import 'os' as os %}{{ os.system('true') }}", "not found|cannot"),
    "include": ("{% include '/etc/passwd' %}", "not found|cannot"),
    "wide date": ("{{ strftime_now('%01000000000d') }}", "too much memory|leaves out"),
    "refuses everything": ("{{ raise_exception('never') }}", "never"),
    "says nothing": ("", "leaves out what the user says"),
    "says something else": ("{{ messages | length }} messages", "leaves out what the user says"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_templates(open_keys: Any, bpe_keys: dict[str, Any], case: str) -> None:
    source, match = UNUSABLE[case]
    template = load_template(open_keys(bpe_keys | {"chat_template": source}))
    assert template.origin == "builtin"
    assert template.warning is not None
    assert template.warning.endswith("; the built-in MiniMax-M2 template is used.")
    assert re.search(match, template.warning), template.warning
    assert rendered(template, USER).endswith("Hi[e~[\n]~b]ai\n<think>\n")


def test_template_of_the_wrong_type(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    with pytest.raises(BadModelError, match=r"'tokenizer.chat_template' is a int"):
        load_template(open_keys(bpe_keys | {"chat_template": 3}))


GENERATION = """{% for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}
{% set x = 'inside' %}<{{ m.content }}>
        {% endgeneration -%}
    {% else %}
{% generation %}{{ m.content }}{% endgeneration %}
    {% endif %}
{% endfor %}{{ x }}{# {% generation %} #}{% raw %}{% generation %}{% endraw %}
{{ '{% generation %}' ~ "{%endgeneration%}" }}"""


def test_generation_tags_do_nothing() -> None:
    """As transformers renders them: they mark, for trainers, what the model said."""

    class Generation(jinja2.ext.Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    context = {"messages": [*USER, {"role": "assistant", "content": "a"}, *USER]}
    assert InProcess(GENERATION).render(json.dumps(context)) == environment.from_string(GENERATION).render(**context)
    assert without_generation("{%+generation-%}{{'") == "{%+ with -%}{{'"


def test_the_clock_is_read_once(open_keys: Any, bpe_keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * 365))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    template = load_template(open_keys(bpe_keys | {"chat_template": source}))
    assert template.origin == "file" and "reads the clock" in (template.warning or "")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert rendered(template, USER) == "01 January 1971 Hi"
    assert isinstance(template._engine, InChild)
    template._engine.close()  # another process, the same time
    assert rendered(template, USER) == "01 January 1971 Hi"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert str(time.gmtime().tm_year)[:2] in rendered(Template(source, "file"), USER)
    monkeypatch.undo()
    time.tzset()


def test_a_template_cannot_change_the_messages() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi", "name": [1]}]
    before = json.dumps(messages)
    source = "{{ messages.append(1) }}{{ messages[0].update({'content': 'x'}) }}{{ messages[0].name.clear() }}"
    for engine in (InProcess(source), InChild(source)):
        engine.render(json.dumps({"messages": messages}))
    rendered(Template(source, "file"), messages)
    assert json.dumps(messages) == before


def test_refusal_while_rendering() -> None:
    template = Template("{{ raise_exception('roles must alternate') }}", "file")
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        rendered(template, USER)
    with pytest.raises(BadModelError, match=r"failed: .*--template builtin"):
        rendered(Template("{{ a.b.c }}", "file"), USER)


def test_numbers_come_out_as_they_went_in() -> None:
    context = {"v": [2.0, 1e20, 1e16, 0.1, -0.0, 10**40, -(2**63), 2**63, True, None]}
    source = "{{ v | tojson }} {% for x in v %}{{ x | tojson }} {% endfor %}"
    assert InProcess(source).render(json.dumps(context)) == by_jinja2(source, context)


def test_a_child_serves_many_and_comes_back() -> None:
    child = InChild("{{ 'x' * n }}{% for i in range(m) %}{% for j in range(m) %}{% endfor %}{% endfor %}")
    assert child.render('{"n": 3, "m": 1}') == "xxx"
    first = child._child
    with pytest.raises(RenderError, match="fuel"):
        child.render('{"n": 3, "m": 9999}')
    assert child.render('{"n": 2, "m": 1}') == "xx"
    assert first is not None and child._child is first
    first.kill()
    with pytest.raises(RenderError, match="process ended"):
        child.render('{"n": 3, "m": 1}')
    assert child.render('{"n": 3, "m": 1}') == "xxx"
    second = child._child
    assert second is not None and second is not first
    del child
    gc.collect()
    assert second.returncode is not None


def test_long_conversation() -> None:
    messages = [*USER, {"role": "assistant", "content": "Hello. " * 50}] * 1000
    for engine in (InProcess(m2_template.SOURCE), InChild(m2_template.SOURCE)):
        assert engine.render(json.dumps({"messages": messages})).count("Hello") == 50_000
    with pytest.raises(UsageError, match="limit 16777216"):
        rendered(Template(m2_template.SOURCE, "builtin"), [{"role": "user", "content": "x" * (1 << 24)}])
