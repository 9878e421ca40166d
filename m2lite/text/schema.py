"""What a tool's JSON schema says of its arguments: which JSON types and literals each may be. Fetches nothing.

References are resolved by `referencing`, within the schema only. What is left open here (formats, lengths, bounds) does
not decide how a value is written.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

TYPES: Final = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})
_MOST_ALTERNATIVES = 64  # of a schema as a whole; more are one, in which each argument may be what it is in any
_MOST_DEPTH = 100  # of schemas within each other; what lies deeper is left open
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class SchemaError(Exception):
    """A schema that cannot be followed: what it does, behind "its schema"."""


def json_type(value: object) -> str:
    kinds: tuple[tuple[str, type], ...] = (
        ("string", str), ("boolean", bool), ("integer", int), ("number", float), ("object", dict), ("array", list),
    )  # fmt: skip
    return next((name for name, kind in kinds if isinstance(value, kind)), "null")


@dataclass(frozen=True)
class Allowed:
    """Values of these types, and these literals besides."""

    types: frozenset[str]
    literals: tuple[Any, ...] = ()

    def accepts(self, value: object) -> bool:
        kind = json_type(value)
        is_whole = kind == "number" and isinstance(value, float) and value.is_integer()
        return (
            kind in self.types or (is_whole and "integer" in self.types) or any(_same(value, x) for x in self.literals)
        )

    @property
    def may_be_text(self) -> bool:
        return "string" in self.types or any(isinstance(x, str) for x in self.literals)

    def both(self, other: Allowed) -> Allowed:
        kept = [x for x in self.literals if other.accepts(x)] + [x for x in other.literals if self.accepts(x)]
        return Allowed(self.types & other.types, _distinct(kept))

    def either(self, other: Allowed) -> Allowed:
        return Allowed(self.types | other.types, _distinct([*self.literals, *other.literals]))

    def __str__(self) -> str:
        names = sorted(self.types - ({"integer"} if "number" in self.types else set()))
        return " or ".join([*names, *(json.dumps(x, ensure_ascii=False) for x in self.literals)]) or "nothing"


ANYTHING: Final = Allowed(TYPES)


def _same(a: object, b: object) -> bool:
    """Equal as JSON: 1 is 1.0, and not true."""
    if {json_type(a), json_type(b)} <= {"integer", "number"}:
        return a == b
    return json_type(a) == json_type(b) and json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({json.dumps([json_type(x), x], sort_keys=True): x for x in values}.values())


@dataclass(frozen=True, eq=False)
class _Level:
    """What one schema says itself of the arguments."""

    properties: Mapping[str, Allowed]
    patterns: tuple[tuple[re.Pattern[str], Allowed], ...] = ()
    others: Allowed | None = None  # None: nothing is said
    is_closed: bool = False  # there are no others

    def of(self, name: str) -> Allowed | None:
        named = [self.properties[name]] if name in self.properties else []
        found = named + [allowed for pattern, allowed in self.patterns if pattern.search(name)]
        return reduce(Allowed.both, found) if found else self.others


@dataclass(frozen=True, eq=False)
class _AnyOf:
    """Too many alternatives to try one by one."""

    alternatives: tuple[Arguments, ...]
    is_closed: bool = False

    @property
    def properties(self) -> dict[str, Allowed]:
        return {name: ANYTHING for each in self.alternatives for name in each.names}

    def of(self, name: str) -> Allowed | None:
        found = [allowed for each in self.alternatives if (allowed := each.of(name)) is not None]
        return reduce(Allowed.either, found) if found else None


@dataclass(frozen=True)
class Arguments:
    """One alternative of what a call's arguments may be."""

    levels: tuple[_Level | _AnyOf, ...] = ()
    required: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Of the arguments that are declared."""
        return list(dict.fromkeys(name for level in self.levels for name in level.properties))

    def of(self, name: str) -> Allowed | None:
        """What the argument may be; None: nothing is said of it."""
        found = [allowed for level in self.levels if (allowed := level.of(name)) is not None]
        return reduce(Allowed.both, found) if found else None

    def has_no(self, name: str) -> bool:
        """Whether the schema rules the argument out."""
        return any(level.is_closed and level.of(name) is None for level in self.levels)

    def both(self, other: Arguments) -> Arguments:
        levels = tuple(dict.fromkeys((*self.levels, *other.levels)))
        return Arguments(levels, self.required | other.required)


class Schema:
    """A JSON schema with its own definitions; SchemaError where a reference leads out of it or nowhere."""

    def __init__(self, schema: object) -> None:
        self._schema = schema
        self._known: dict[tuple[str, int], Any] = {}  # what was found of a schema, by the id of its object
        self._targets: dict[int, list[Any]] = {}  # what a schema refers to, likewise
        if _refers(schema):
            self._follow()

    def arguments(self) -> list[Arguments]:
        """The alternatives for all arguments together; at least one."""
        return self._arguments(self._schema, 0)

    def _follow(self) -> None:
        """Find what every reference means: none may lead out of the schema."""
        from referencing import Registry, Resource  # 30 ms
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012

        try:
            try:
                root: Resource[Any] = Resource.from_contents(self._schema, default_specification=DRAFT202012)
            except Exception:  # a dialect that nobody knows
                root = DRAFT202012.create_resource(self._schema)
            registry: Registry[Any] = Registry()
            rest = [(root, registry.with_resource("", root).crawl().resolver_with_root(root))]
            while rest:
                resource, resolver = rest.pop()
                if id(resource.contents) in self._targets:
                    continue
                targets = self._targets[id(resource.contents)] = []
                for reference in _references(resource.contents):
                    try:
                        found = resolver.lookup(reference)
                    except Unresolvable:
                        raise SchemaError(f"refers to {reference!r}, which is not in it") from None
                    targets.append(found.contents)
                    rest.append((DRAFT202012.create_resource(found.contents), found.resolver))
                rest += [(each, resolver.in_subresource(each)) for each in resource.subresources()]
        except SchemaError:
            raise
        except Exception as error:  # the library expects schemas that are valid
            raise SchemaError(f"cannot be read as a JSON schema ({type(error).__name__})") from None

    def _once(self, what: Callable[[Mapping[str, Any], int], Any], open_: Any, schema: object, depth: int) -> Any:
        """`what` of the schema, found once; `open_`, which says nothing, within itself and too deep."""
        if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
            return open_
        key = what.__name__, id(schema)
        if key not in self._known:
            self._known[key] = open_
            self._known[key] = what(schema, depth + 1)
        return self._known[key]

    def allowed(self, schema: object, depth: int = 0) -> Allowed:
        """What a value of the schema may be."""
        if schema is False:
            return Allowed(frozenset())
        found: Allowed = self._once(self._allowed_by, ANYTHING, schema, depth)
        return found

    def _allowed_by(self, schema: Mapping[str, Any], depth: int) -> Allowed:
        said = [_by_type(schema)]
        if "const" in schema:
            said.append(Allowed(frozenset(), (schema["const"],)))
        if isinstance(schema.get("enum"), list):
            said.append(Allowed(frozenset(), tuple(schema["enum"])))
        said += [self.allowed(item, depth) for item in self.all_of(schema)]
        for items in _any_of(schema):
            said.append(reduce(Allowed.either, [self.allowed(item, depth) for item in items]))
        found = reduce(Allowed.both, said)
        return found.either(Allowed(frozenset({"null"}))) if schema.get("nullable") is True else found

    def _arguments(self, schema: object, depth: int) -> list[Arguments]:
        found: list[Arguments] = self._once(self._arguments_by, [Arguments()], schema, depth)
        return found

    def _arguments_by(self, schema: Mapping[str, Any], depth: int) -> list[Arguments]:
        required = schema.get("required")
        names = frozenset(x for x in required if isinstance(x, str)) if isinstance(required, list) else frozenset()
        found = [Arguments((self._level(schema, depth),), names)]
        for item in self.all_of(schema):
            found = _product(found, self._arguments(item, depth))
        for items in _any_of(schema):
            found = _product(found, [each for item in items for each in self._arguments(item, depth)])
        dependent = schema.get("dependentSchemas")
        for item in dependent.values() if isinstance(dependent, Mapping) else ():
            found = _product(found, [*self._arguments(item, depth), Arguments()])
        return found

    def _level(self, schema: Mapping[str, Any], depth: int) -> _Level:
        properties, patterns = schema.get("properties"), schema.get("patternProperties")
        named = properties if isinstance(properties, Mapping) else {}
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        matching = []
        for pattern, item in patterns.items() if isinstance(patterns, Mapping) else ():
            with contextlib.suppress(re.error):  # ECMA's expressions are not all Python's: such a one says nothing
                matching.append((re.compile(pattern), self.allowed(item, depth)))
        return _Level(
            {name: self.allowed(item, depth) for name, item in named.items()},
            tuple(matching),
            self.allowed(others, depth) if isinstance(others, Mapping) else None,
            is_closed=schema.get("additionalProperties") is False,
        )

    def all_of(self, schema: Mapping[str, Any]) -> list[Any]:
        """The schemas that hold as well: those of its allOf, and what it refers to."""
        items = schema.get("allOf")
        return [*(items if isinstance(items, list) else []), *self._targets.get(id(schema), [])]


def _by_type(schema: Mapping[str, Any]) -> Allowed:
    named = schema.get("type")
    names = {named} if isinstance(named, str) else set()
    if isinstance(named, list):
        names = {x for x in named if isinstance(x, str)}
    known = names & TYPES
    if "number" in known:
        known.add("integer")
    return Allowed(frozenset(known)) if known else ANYTHING


def _any_of(schema: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Lists of schemas, of each of which one holds."""
    for key in ("anyOf", "oneOf"):
        items = schema.get(key)
        if isinstance(items, list) and items:
            yield items
    if "if" in schema:
        yield [schema.get("then", {}), schema.get("else", {})]


def _product(a: list[Arguments], b: list[Arguments]) -> list[Arguments]:
    if len(a) * len(b) > _MOST_ALTERNATIVES:
        b = [Arguments((_AnyOf(tuple(b)),))]
    if len(a) * len(b) > _MOST_ALTERNATIVES:
        a = [Arguments((_AnyOf(tuple(a)),))]
    return [x.both(y) for x in a for y in b]


def _references(schema: object) -> list[str]:
    if not isinstance(schema, Mapping):
        return []
    return [schema[key] for key in _REFERENCES if isinstance(schema.get(key), str)]


def _refers(value: object) -> bool:
    """Whether a reference may be anywhere in it."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Mapping):
            if _references(item):
                return True
            rest += item.values()
        elif isinstance(item, list):
            rest += item
    return False
