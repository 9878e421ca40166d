"""Which tools an answer may or must call, and the rule that keeps it to that. Knows ids and schemas, no messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from m2lite.errors import UsageError
from m2lite.sampling.draw import Logits
from m2lite.sampling.json_schema import MOST_TOKENS, Constraint, Masks, Matching, Schema, json_rule, why_wrong, without
from m2lite.sampling.rules import LogitsProcessor
from m2lite.sampling.tool_grammar import CallGrammar
from m2lite.text.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]
_WHAT: Final = "The form of the tool calls"
_MOST_GRAMMAR: Final = 4 << 20  # characters


@dataclass(frozen=True)
class NamedTool:
    """The one tool that must be called, once."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


@dataclass(frozen=True)
class CallRules:
    """What is asked of an answer's calls; `schema` if it may be JSON of that in place of a block of calls."""

    tools: Tools
    choice: ToolChoice = "auto"
    is_parallel: bool = True  # a block may hold several calls
    schema: Schema | None = None

    @classmethod
    def of(
        cls, tools: Tools | None, choice: ToolChoice, is_parallel: bool, schema: Schema | None = None
    ) -> CallRules | None:
        """None where nothing is asked of calls, but for a schema of the content; UsageError for what cannot be."""
        names = [tool.get("function", tool).get("name") for tool in tools or ()]
        if isinstance(choice, NamedTool) and choice.name not in names:
            there_are = f"There are {', '.join(map(repr, names))}." if names else "Give it among the tools."
            raise UsageError(f"tool_choice names the tool {choice.name!r}, which was not given.", there_are)
        if choice == "required" and not names:
            raise UsageError('tool_choice is "required", and no tools were given.', "Give tools.")
        if not tools or (choice == "auto" and is_parallel and schema is None and not any(map(_is_strict, tools))):
            return None
        return cls(tools, choice, is_parallel, schema)

    @property
    def is_needed(self) -> bool:
        """Whether what comes behind the thinking is of the grammar, from its first token on."""
        return self.choice == "required" or isinstance(self.choice, NamedTool) or self._may_be_json

    @property
    def _may_be_json(self) -> bool:
        return self.choice == "auto" and self.schema is not None

    def grammar(self, open_id: int, close_id: int) -> str:
        """Of what comes behind the thinking, or behind the token that opens a block; empty where no call may come.

        UsageError for schemas that cannot be kept to.
        """
        if self.choice == "none":
            return ""
        rules = CallGrammar()
        tools = {tool.get("function", tool)["name"]: tool for tool in self.tools}
        if isinstance(self.choice, NamedTool):
            tools = {self.choice.name: tools[self.choice.name]}
        calls = [rules.add(tool, by_schema=self.is_needed or _is_strict(tool)) for tool in tools.values()]
        is_one = isinstance(self.choice, NamedTool) or not self.is_parallel
        block = f'"\\n" ({" | ".join(calls)}){"" if is_one else "+"} <[{close_id}]>'
        start = f"start: {block}\n"
        if self.is_needed:  # line breaks as the template writes them around an empty content
            json = f" | JSON_BREAKS {json_rule(self.schema)}" if self._may_be_json else ""
            start = f"start: BREAKS <[{open_id}]> {block}{json}\nBREAKS: /\\n{{0,3}}/\nJSON_BREAKS: /\\n{{0,2}}/\n"
        grammar = start + rules.text
        if len(grammar) > _MOST_GRAMMAR:
            raise UsageError(
                f"The schemas of the tools make a grammar of {len(grammar):,} characters, limit {_MOST_GRAMMAR:,}.",
                "Give fewer tools, or shorter schemas.",
            )
        if why := why_wrong(grammar):
            raise UsageError(f"The schemas of the tools cannot be used: {why[:300]}.", "Correct or simplify them.")
        return grammar

    def check(self) -> None:
        """UsageError for schemas that cannot be kept to, whatever the model."""
        self.grammar(1, 2)

    def rule(self, masks: Masks, in_thinking: bool, most_tokens: int | None) -> LogitsProcessor:
        """For an answer that begins now. At most `most_tokens` of JSON, if it is that."""
        tokenizer = masks.tokenizer
        open_id, close_id = tokenizer.tool_open_id, tokenizer.tool_close_id
        if open_id is None or close_id is None:
            raise UsageError("The vocabulary of this model has no tokens for tool calls.", "Leave the tools out.")
        grammar = self.grammar(open_id, close_id)
        if not self.is_needed:
            return BlockRule(masks, grammar, in_thinking, None if self.is_parallel else 1)
        most = (most_tokens or MOST_TOKENS) if self._may_be_json else None
        return Constraint(Matching(masks, grammar, _WHAT), tokenizer, in_thinking, most, has_calls=True)


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool.get("function", tool).get("strict") is True


def content_rules(
    masks: Masks, calls: CallRules | None, schema: Schema | None, in_thinking: bool, most_tokens: int | None
) -> list[LogitsProcessor]:
    """For an answer that begins now: what its calls keep to, and its content. At most `most_tokens` of JSON."""
    rules: list[LogitsProcessor] = []
    if calls is not None:
        rules.append(calls.rule(masks, in_thinking, most_tokens))
    if schema is not None and (calls is None or calls.choice == "none"):
        rules.append(masks.constraint(schema, in_thinking, most_tokens))
    return rules


class BlockRule:
    """A rule: from the token that opens a block of calls to the one that closes it, only text of the grammar.

    Thinking and content are free, but a block cannot begin inside the thinking, nor where there were enough of them.
    """

    def __init__(self, masks: Masks, grammar: str, in_thinking: bool, n_blocks: int | None) -> None:
        """`n_blocks` may come, or any number; without a grammar none."""
        self._masks, self._grammar, self._n_left = masks, grammar, n_blocks if grammar else 0
        self._tokenizer: Tokenizer = masks.tokenizer
        self._in_thinking, self._is_blank = in_thinking, True
        self._block: Matching | None = None
        if grammar:
            _ = masks.vocabulary  # takes seconds for M2's, which belong before the answer

    def apply(self, logits: Logits) -> Logits:
        if self._block is not None:
            return self._block.apply(logits)
        open_id = self._tokenizer.tool_open_id
        assert open_id is not None
        return without(logits, [open_id]) if self._in_thinking or self._n_left == 0 else logits

    def push(self, token: int) -> None:
        tokenizer = self._tokenizer
        if self._block is not None:
            self._block.push(token)
            if token == tokenizer.tool_close_id:
                self._block = None
        elif self._in_thinking:
            self._in_thinking = token != tokenizer.think_close_id
        elif token == tokenizer.think_open_id and self._is_blank:
            self._in_thinking = True
        elif token == tokenizer.tool_open_id and self._n_left != 0:
            self._block = Matching(self._masks, self._grammar, _WHAT)
            self._n_left = None if self._n_left is None else self._n_left - 1
        self._is_blank = self._is_blank and tokenizer.token_bytes(token).isspace()
