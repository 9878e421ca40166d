"""Chats that keep their ids, chats that were summed up, and answers that a text ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m2lite import Model, Sampling, UsageError
from m2lite.dialogue.conversation import SUMMARY_REQUEST, Conversation, Message
from m2lite.dialogue.encode import encode_kept
from m2lite.text.reply import Said
from m2lite.text.template import Template, encode_chat

GREEDY = Sampling(temperature=0, seed=0)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


@pytest.fixture
def kept(tiny: Model) -> Iterator[Conversation]:
    with tiny.session() as session:
        conversation = Conversation(session, "Be brief.")
        conversation.keep_thinking = True
        yield conversation


def test_rows_only_grow(tiny: Model, kept: Conversation) -> None:
    """Each turn's row begins with the one before it, thinking and all, so only the new turn is read."""
    tokenizer, before = tiny.tokenizer, list[int]()
    for question in ("Hello", "Who are you?", "What is 2 + 3?"):
        list(kept.ask(question, sampling=GREEDY, max_tokens=120))
        assert kept.session.tokens[: len(before)] == before
        assert kept.answer.stats.n_reused >= len(before) - 1 - 16  # a few again, for the prediction modules
        before = kept.session.tokens[:]
    text = tokenizer.decode(before)
    assert text.count("<think>") == 3
    rendered = tokenizer.decode(encode_chat(tokenizer, tiny.template, kept.messages, add_generation_prompt=False))
    assert rendered.count("<think>") == 1  # those before the last question lose it
    for message in kept.messages:
        if message["role"] == "assistant":
            assert message["reasoning_content"] in text and message["reasoning_content"]


def test_row_of_one_turn_is_the_templates(tiny: Model, kept: Conversation) -> None:
    messages = [*kept.messages, {"role": "user", "content": "Hi"}]
    assert kept.encode(messages) == encode_chat(tiny.tokenizer, tiny.template, messages)


def test_without_thinking_it_is_the_templates_row(tiny: Model) -> None:
    """Whatever is between the answers: questions, results of several tools, the end."""
    calls = [{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "content": "I do", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    expected = encode_chat(tiny.tokenizer, tiny.template, messages, TOOLS)
    xml = '\n<minimax:tool_call>\n<invoke name="f">\n</invoke>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>'
    close = tiny.tokenizer.encode("</think>", control=True)
    told = [tiny.tokenizer.encode("Hello."), tiny.tokenizer.encode("I do" + xml, control=True)]
    messages[1] = Said.of(messages[1], [*close, *told[0]])
    messages[3] = Said.of(messages[3], [*close, *told[1]])
    row = encode_kept(tiny.tokenizer, tiny.template, messages, TOOLS, is_to_answer=True)
    opened = tiny.tokenizer.encode("<think>\n</think>", control=True)
    text, opened_text = tiny.tokenizer.decode(row), tiny.tokenizer.decode(opened)
    assert text.count(opened_text) == 2
    assert text.replace(opened_text, "") == tiny.tokenizer.decode(expected)


def kept_text(tiny: Model, said: str | None, message: Message) -> str:
    """The answer and the next question in a row that keeps what was said; None: nobody kept its ids."""
    tokens = None if said is None else tiny.tokenizer.encode(said, control=True)
    messages = [{"role": "user", "content": "Hi"}, Said.of({"role": "assistant", "content": ""} | message, tokens)]
    messages.append({"role": "user", "content": "And?"})
    row = encode_kept(tiny.tokenizer, tiny.template, messages, TOOLS, is_to_answer=False)
    return tiny.tokenizer.decode(row).rpartition("Hi[e~[\n]~b]ai\n<think>\n")[2].removesuffix("\n]~b]user\nAnd?[e~[\n")


def test_where_the_thinking_of_a_kept_answer_ends(tiny: Model) -> None:
    call = '<minimax:tool_call>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>'
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    for said, message, text in (
        ("hm", {"reasoning_content": "hm"}, "hm\n</think>\n\n"),  # it was stopped there
        ("hm\n</think>\n\na <think> b", {"content": "a <think> b"}, "hm\n</think>\n\na <think> b"),
        (f"hm\n{call}", {"reasoning_content": "hm", "tool_calls": calls}, f"hm\n{call}"),
        (None, {"reasoning_content": "hm", "tool_calls": calls}, f"hm\n</think>\n\n\n{call}"),
        (None, {"content": "a", "tool_calls": calls}, f"\n</think>\n\na\n{call}"),
    ):
        assert kept_text(tiny, said, message) == text + "[e~[", said


def test_next_turn_is_a_fresh_prefill_of_its_row(tiny: Model, kept: Conversation) -> None:
    list(kept.ask("Hello", sampling=GREEDY, max_tokens=60))
    pieces = kept.ask("Tell me a story.", sampling=GREEDY, max_tokens=60)
    for _ in range(5):
        next(pieces)
    pieces.close()  # within the thinking
    list(kept.ask("And then?", sampling=GREEDY, max_tokens=3))
    row = kept.encode(kept.messages[:-1])
    assert kept.session.tokens[: len(row)] == row
    assert tiny.tokenizer.decode(row).count("</think>") == 2  # what was stopped is closed
    with tiny.session() as fresh:
        tokens = list(fresh.generate(row, sampling=GREEDY, max_tokens=3))
    assert tokens == kept.answer.tokens


def test_messages_without_ids_are_written_anew(tiny: Model, kept: Conversation) -> None:
    list(kept.ask("Hello", sampling=GREEDY, max_tokens=60))
    kept.messages = [dict(message) for message in kept.messages]  # as from a file of another program
    list(kept.ask("Who are you?", sampling=GREEDY, max_tokens=5))
    assert str(kept.messages[2]["reasoning_content"]) in tiny.tokenizer.decode(kept.session.tokens)


def test_template_that_looks_ahead_is_refused(tiny: Model) -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{{ messages | length }}[e~[{% endfor %}"
        "{% if add_generation_prompt %}ai{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(UsageError, match="what follows it"):
        encode_kept(tiny.tokenizer, Template(source, "file"), messages, None, is_to_answer=True)


def three_turns(conversation: Conversation) -> None:
    for question in ("Hello", "Tell me a story.", "What is 2 + 3?"):
        list(conversation.ask(question, sampling=GREEDY, max_tokens=80))


def test_summary_takes_the_place_of_earlier_turns(tiny: Model) -> None:
    with tiny.session() as session:
        conversation = Conversation(session, "Be brief.")
        three_turns(conversation)
        last, said = conversation.messages[-2:], conversation.said
        pieces = list(conversation.summarise(sampling=GREEDY))
        summary = "".join(piece.text for piece in pieces if piece.kind == "content").strip()
        assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
        assert conversation.messages[1]["content"] == SUMMARY_REQUEST
        assert conversation.messages[2]["content"].strip() == summary and summary
        assert "reasoning_content" not in conversation.messages[2]
        assert conversation.messages[3:] == last and conversation.said is said
        assert conversation.answer.stats.n_reused > 0  # the earlier turns were there
        list(conversation.summarise(0, sampling=GREEDY))
        assert len(conversation.messages) == 3
        list(conversation.ask("And?", sampling=GREEDY, max_tokens=5))


@pytest.mark.parametrize("ending", ["stopped", "cut off", "nothing"])
def test_without_a_summary_nothing_changes(tiny: Model, ending: str) -> None:
    with tiny.session() as session:
        conversation = Conversation(session)
        three_turns(conversation)
        before = list(conversation.messages), conversation.said
        if ending == "cut off":
            list(conversation.summarise(sampling=GREEDY, max_tokens=4))
        else:
            pieces = conversation.summarise(sampling=GREEDY)
            for _ in range(4 if ending == "stopped" else 0):
                next(pieces)
            pieces.close()
        assert (conversation.messages, conversation.said) == before
        assert conversation.answer.is_aside


def test_nothing_to_sum_up(tiny: Model) -> None:
    with tiny.session() as session:
        conversation = Conversation(session)
        with pytest.raises(UsageError, match="0 turns"):
            conversation.summarise(sampling=GREEDY)
        list(conversation.ask("Hello", sampling=GREEDY, max_tokens=5))
        with pytest.raises(UsageError, match="1 turns"):
            conversation.summarise(sampling=GREEDY)


@pytest.mark.parametrize("draft", ["off", "auto", "mtp"])
def test_stop_text_ends_the_answer_before_it(tiny: Model, draft: str) -> None:
    with tiny.session(draft) as session:
        conversation = Conversation(session)
        list(conversation.ask("Tell me a story.", sampling=GREEDY, max_tokens=200))
        whole = conversation.answer.reply.content
        word = whole.split()[12]
        assert whole.count(word) >= 1
        pieces = list(conversation.regenerate(sampling=GREEDY, stop_texts=[word, "no such text"]))
        answer = conversation.answer
        assert answer.finish_reason == "stop"
        assert answer.reply.content == whole[: whole.index(word)]
        assert "".join(p.text for p in pieces if p.kind == "content") == answer.reply.content
        assert conversation.messages[-1]["content"] == answer.reply.content
        list(conversation.ask("Go on.", sampling=GREEDY, max_tokens=3))
        row = conversation.encode(conversation.messages[:-1])
        logits = np.asarray(tiny.logits(row))[-1]
        assert int(logits.argmax()) == conversation.answer.tokens[0]


def test_stop_text_in_the_thinking_does_not_count(tiny: Model) -> None:
    with tiny.session() as session:
        conversation = Conversation(session)
        list(conversation.ask("Tell me a story.", sampling=GREEDY, max_tokens=200))
        word = conversation.answer.reply.thinking.split()[0]
        list(conversation.regenerate(sampling=GREEDY, max_tokens=200, stop_texts=[word]))
        assert conversation.answer.reply.thinking.startswith(word)
