"""MiniMax-M2's block of tool calls as a grammar of llguidance, by the tools' schemas. Knows no token and no answer.

The tags and line breaks are those that the chat template writes. Parameters come in any order, each once; those that
must come do, and others than a schema's own only where it says so. What is written so is read back by text/calls.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from m2lite.errors import UsageError
from m2lite.sampling.json_schema import json_rule, why_wrong
from m2lite.sampling.tool_values import ANY_TEXT, TERMINALS, CannotKeep, ValueForm, Values, literal
from m2lite.text.schema import SchemaError

_MOST_PARAMETERS: Final = 64  # llguidance counts them in as many bits
_MOST_ALTERNATIVES: Final = 16  # of a tool's parameters as a whole
_MOST_DEPTH: Final = 20
_UNKNOWN: Final = (
    "not", "if", "const", "enum", "patternProperties", "propertyNames", "minProperties", "maxProperties",
    "dependentSchemas", "dependentRequired", "dependencies", "unevaluatedProperties",
)  # fmt: skip
_NAME = re.compile(r'[^<>"\x00-\x1f\x7f]+')
_OTHER_NAME: Final = r'/<parameter name="[^<>"\x00-\x1f\x7f]+">/'
_TODO: Final = "Change it, or leave strict out."


@dataclass(frozen=True)
class _Parameters:
    """One alternative of a tool's parameters: the schemas that each value fits, and those that must come."""

    schemas: Mapping[str, list[Any]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    is_closed: bool = False
    others: Any = None  # the schema of those that are not named, where there may be some

    def both(self, other: _Parameters) -> _Parameters | None:
        """Those that fit both; None where there are none."""
        names = [
            name
            for name in dict.fromkeys((*self.schemas, *other.schemas))
            if (name in self.schemas or not self.is_closed) and (name in other.schemas or not other.is_closed)
        ]
        required = self.required | other.required
        is_closed = self.is_closed or other.is_closed
        if is_closed and not required <= set(names):
            return None
        schemas = {name: [*self.schemas.get(name, []), *other.schemas.get(name, [])] for name in names}
        return _Parameters(schemas, required, is_closed, other.others if self.others is None else self.others)


class CallGrammar:
    """The rules of calls of these tools; `start` and the tokens around a block are its user's."""

    def __init__(self) -> None:
        self._terminals = dict[str, str]()  # expression -> name
        self._values = dict[str, str]()  # body of the rule of a value -> name
        self._rules = list[str]()

    @property
    def text(self) -> str:
        """All rules of what was added."""
        terminals = [f"{name}: {expression}\n" for expression, name in self._terminals.items()]
        values = [f"{name}: {body}\n" for body, name in self._values.items()]
        return "".join([*self._rules, *values, *terminals, TERMINALS])

    def add(self, tool: Mapping[str, Any], by_schema: bool = True) -> str:
        """The name of the rule of one call of the tool, by its schema or with any parameters.

        A strict tool's schema is kept to whole, or UsageError; another's as far as it can be.
        """
        function = tool.get("function", tool)
        name, is_strict = function["name"], function.get("strict") is True
        if not _NAME.fullmatch(name):
            raise UsageError(f"No call can hold the name of the tool {name!r}.", "Use letters, digits, _ and -.")
        rule, parameters, found = f"call_{len(self._rules)}", function.get("parameters"), list[str]()
        try:
            if by_schema:
                found = self._by_schema(rule, {} if parameters is None else parameters, is_strict)
        except (CannotKeep, SchemaError) as error:
            if is_strict:
                raise UsageError(f"The schema of the tool {name!r} {error}, which cannot be kept to.", _TODO) from None
        head = literal(f'<invoke name="{name}">\n')
        rest = f'({self._other((), ANY_TEXT)})* "</invoke>\\n"'
        if found:
            rest = f"({' | '.join(f'{rule}_{n}::0x0' for n in range(len(found)))})"
        self._rules.append("".join([f"{rule}: {head} {rest}\n", *found]))
        return rule

    def _by_schema(self, rule: str, parameters: object, is_strict: bool) -> list[str]:
        """What follows the name: a rule for each alternative, `rule` and its number."""
        values, found = Values(parameters), list[str]()
        alternatives = _alternatives(values, parameters, is_strict, 0)
        if is_strict:
            _check_readable(values, alternatives)
        for each in alternatives:
            found += self._body(f"{rule}_{len(found)}", values, each, is_strict)
        if not found:
            raise CannotKeep("allows no call at all")
        return found

    def _body(self, rule: str, values: Values, parameters: _Parameters, is_strict: bool) -> list[str]:
        """The rule of the parameters that are still to come, by the bits of those that came; none if it has no end."""
        schemas = {name: [{}] if parameters.others is None else [parameters.others] for name in parameters.required}
        schemas |= parameters.schemas
        forms = {name: _form(values, name, each, is_strict) for name, each in schemas.items()}
        forms = {name: form for name, form in forms.items() if form != ValueForm()}
        named = parameters.schemas.keys() if parameters.is_closed else forms.keys()
        if not parameters.required <= forms.keys() & named:
            return []
        names = sorted(forms, key=lambda name: name not in parameters.required)
        if len(names) > _MOST_PARAMETERS:
            raise CannotKeep(f"has {len(names)} parameters (limit {_MOST_PARAMETERS})")
        n_required = len(parameters.required)
        is_whole = f"is_ones([0:{n_required}])" if n_required else "true" if names else "is_zeros([0:1])"
        lines = [f'"</invoke>\\n" %if {is_whole}']
        for n, name in enumerate(names):
            tag = literal(f'<parameter name="{name}">')
            lines.append(f"{tag} {self._value(forms[name], is_strict)} {rule}::set_bit({n}) %if bit_clear({n})")
        if parameters.others is not None:
            lines.append(f"{self._other(names, _form(values, '', [parameters.others], is_strict))} {rule}::_")
        return [f"{rule}::_ : {' | '.join(lines)}\n"]

    def _other(self, names: Sequence[str], form: ValueForm) -> str:
        """A parameter of another name."""
        named = " | ".join(literal(f'<parameter name="{name}">') for name in names)
        return f"{self._terminal(f'{_OTHER_NAME} & ~({named})' if named else _OTHER_NAME)} {self._value(form, False)}"

    def _value(self, form: ValueForm, is_strict: bool) -> str:
        """The rule of a value and its closing tag."""
        parts = [] if form.text is None else [self._terminal(f"({_within(form.text)}) END")]
        if form.json is not None:
            parts.append(f"{json_rule(form.json, not is_strict)} END")
        return self._values.setdefault(" | ".join(parts), f"value_{len(self._values)}")

    def _terminal(self, expression: str) -> str:
        return self._terminals.setdefault(expression, f"T_{len(self._terminals)}")


def _within(text: str) -> str:
    return text if text == ANY_TEXT.text else f"({text}) & {ANY_TEXT.text}"


def _form(values: Values, name: str, schemas: list[Any], is_strict: bool) -> ValueForm:
    """Of a parameter's value; of a tool that is not strict, what can be kept of it."""
    try:
        form = values.form(schemas)
        text = None if form.text is None else f"start: T\nT: {_within(form.text)}\n{TERMINALS}"
        json = None if form.json is None else f"start: {json_rule(form.json, not is_strict)}"
        for grammar in (text, json):
            if grammar is not None and (why := why_wrong(grammar)):
                raise CannotKeep(f"says what llguidance refuses ({why[:300]})")
    except (CannotKeep, UsageError) as error:
        if is_strict:
            what = error.what.rstrip(".") if isinstance(error, UsageError) else str(error)
            raise CannotKeep(f"has a parameter {name!r} that {what}") from None
        return values.loose(schemas)
    return form


def _check_readable(values: Values, alternatives: Sequence[_Parameters]) -> None:
    """Whether a value is text must not depend on other values: the reader finds its end by that."""
    kinds = dict[str, bool]()
    for each in alternatives:
        for name, schemas in each.schemas.items():
            if kinds.setdefault(name, values.may_be_text(schemas)) != values.may_be_text(schemas):
                raise CannotKeep(f"has a parameter {name!r} that is text in one alternative only")


def _alternatives(values: Values, schema: object, is_strict: bool, depth: int) -> list[_Parameters]:
    """What all parameters together may be."""
    if depth > _MOST_DEPTH:
        raise CannotKeep("has no end")
    if not isinstance(schema, Mapping):
        return [] if schema is False else [_Parameters()]
    unknown = [name for name in _UNKNOWN if name in schema]
    if unknown and is_strict:
        raise CannotKeep(f"says {unknown[0]!r} of all parameters together")
    if schema.get("type", "object") not in ("object", ["object"]):
        raise CannotKeep(f"is of type {schema['type']!r}, where an object is needed")
    found = [_own(schema, is_strict)]
    for each in values.targets(schema):
        found = _product(found, _alternatives(values, each, is_strict, depth + 1))
    for name in ("anyOf", "oneOf"):
        items = schema.get(name)
        if isinstance(items, list) and items:
            if name == "oneOf" and len(items) > 1 and is_strict:
                raise CannotKeep("says oneOf of all parameters together (use anyOf)")
            inner = [x for item in items for x in _alternatives(values, item, is_strict, depth + 1)]
            found = _product(found, inner)
    return found


def _own(schema: Mapping[str, Any], is_strict: bool) -> _Parameters:
    """What the schema says itself."""
    properties, required, others = (schema.get(key) for key in ("properties", "required", "additionalProperties"))
    properties = properties if isinstance(properties, Mapping) else {}
    names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    for name in (*properties, *names):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CannotKeep(f"has a parameter {name!r}, a name that no call can hold")
    if others not in (None, False) and is_strict:
        raise CannotKeep("allows parameters that it does not name (additionalProperties)")
    schemas = {name: [each] for name, each in properties.items()}
    return _Parameters(schemas, frozenset(names), others is False, None if others is False else others)


def _product(a: list[_Parameters], b: list[_Parameters]) -> list[_Parameters]:
    if len(a) * len(b) > _MOST_ALTERNATIVES:
        raise CannotKeep(f"has {len(a) * len(b)} alternatives (limit {_MOST_ALTERNATIVES})")
    return [both for x in a for y in b if (both := x.both(y)) is not None]
