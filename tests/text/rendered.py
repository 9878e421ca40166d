"""A conversation as text, as `encode_chat` has it rendered but for its guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m2lite.text.messages import check_messages, check_tools
from m2lite.text.template import Template


def rendered(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **values: Any,
) -> str:
    return template.render(check_messages(messages), check_tools(tools), **values)
