"""Given answers: which rule counts, and that all else is as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model
from m2lite.errors import UsageError
from m2lite.serve.scripted import read_script
from tests.serve.conftest import serving

RULES = [
    {"match": ["<response>"], "text": "Seen.\n</think>\n\nIt is written.[e~["},
    {"match": ["grass", "color"], "text": "A color.\n</think>\n\nGreen.[e~["},
    {"match": ["color"], "text": "Some color.\n</think>\n\nNone.[e~["},
]
GRASS: Any = {"role": "user", "content": "What color has grass?"}
CALL: Any = {"function": {"name": "f", "arguments": "{}"}, "type": "function", "id": "1"}
CALLING: Any = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_the_first_rule_behind_the_last_answer_counts(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text(json.dumps(RULES))
    script = read_script(str(tmp_path / "script.json"), tiny.tokenizer)
    conversations: list[tuple[list[Any], str]] = [
        ([GRASS], "Green."),
        ([GRASS, {"role": "assistant", "content": "Green."}, {"role": "user", "content": "And no color?"}], "None."),
        ([GRASS, CALLING, {"role": "tool", "content": "x"}], "It is written."),
    ]
    with serving(tiny, script=script) as served:
        for messages, expected in conversations:
            found = served.openai.chat.completions.create(model="m", messages=messages)
            assert found.choices[0].message.content == expected
            assert found.choices[0].finish_reason == "stop"
    assert script(tiny.tokenizer.encode("Hello")) is None


def test_no_script(tiny: Model, tmp_path: Path) -> None:
    for text in ("{}[", "[3]", '[{"match": ["a"]}]', '[{"match": ["a"], "text": 3}]'):
        (tmp_path / "script.json").write_text(text)
        with pytest.raises(UsageError, match="is no script"):
            read_script(str(tmp_path / "script.json"), tiny.tokenizer)
    with pytest.raises(UsageError, match="is no script"):
        read_script(str(tmp_path / "none.json"), tiny.tokenizer)
