"""One question with pydantic-ai, streamed, in a session that goes on: URL, MODEL, chat or messages, TEXT."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelMessagesTypeAdapter
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


def write_file(path: str, content: str) -> str:
    """Write a text file."""
    Path(path).write_text(content)
    return f"{path} has {len(content)} characters."


async def main() -> None:
    url, name, kind, text = sys.argv[1:]
    model: AnthropicModel | OpenAIChatModel
    if kind == "messages":
        anthropic = AsyncAnthropic(base_url=url, api_key="none", timeout=3600, max_retries=0)
        model = AnthropicModel(name, provider=AnthropicProvider(anthropic_client=anthropic))
    else:
        openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600, max_retries=0)
        model = OpenAIChatModel(name, provider=OpenAIProvider(openai_client=openai))
    agent = Agent(model, instructions="You help with files.", tools=[write_file])
    kept = Path.home() / "session.json"
    history = ModelMessagesTypeAdapter.validate_json(kept.read_bytes()) if kept.exists() else []
    async with agent.run_stream(text, message_history=history) as answer:
        async for piece in answer.stream_text(delta=True):
            print(piece, end="")
        kept.write_bytes(answer.all_messages_json())
    print()


if __name__ == "__main__":
    asyncio.run(main())
