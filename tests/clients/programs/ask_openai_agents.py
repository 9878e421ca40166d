"""One question with openai-agents, in a session that goes on: URL, MODEL, responses or chat, TEXT."""

from __future__ import annotations

import sys
from pathlib import Path

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI


@function_tool
def write_file(path: str, content: str) -> str:
    """Write a text file.

    Args:
        path: where, from here
        content: all of its text
    """
    Path(path).write_text(content)
    return f"{path} has {len(content)} characters."


def main() -> None:
    url, name, kind, text = sys.argv[1:]
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=url, api_key="none", timeout=3600, max_retries=0)
    of_kind = OpenAIResponsesModel if kind == "responses" else OpenAIChatCompletionsModel
    agent = Agent(name="Files", instructions="You help with files.", tools=[write_file], model=of_kind(name, client))
    found = Runner.run_sync(agent, text, session=SQLiteSession("only", Path.home() / "session.db"))
    print(found.final_output)


if __name__ == "__main__":
    main()
