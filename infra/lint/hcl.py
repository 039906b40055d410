"""Terraform's language as far as its names go: blocks, and the arguments in them. Values are not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

OPENING, CLOSING = "([{", ")]}"
SPACE = re.compile(r"[ \t\r]+|(?:#|//)[^\n]*|/\*.*?\*/", re.DOTALL)
HEREDOC = re.compile(r"<<-?(\w+)\n.*?^[ \t]*\1\b", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"[A-Za-z_][\w-]*")
OPERATOR = re.compile(r"==|!=|<=|>=|=>|&&|\|\||\.\.\.|.", re.DOTALL)


@dataclass(frozen=True)
class Token:
    """A piece of a text; a string is one, with all that is interpolated in it."""

    kind: str
    text: str
    line: int


@dataclass
class Block:
    """Body between braces."""

    kind: str
    labels: tuple[str, ...]
    line: int
    arguments: dict[str, int] = field(default_factory=dict)
    """and the lines on which they stand"""
    blocks: list[Block] = field(default_factory=list)


def parsed(text: str) -> Block:
    """A file, as a block without a name. Raises ValueError, with the line, when it is none."""
    tokens = [*tokenized(text), Token("end", "the end of the file", text.count("\n") + 1)]
    whole = Block("", (), 1)
    at = _body(tokens, 0, whole)
    if tokens[at].kind != "end":
        raise _refused(tokens[at])
    return whole


def tokenized(text: str) -> Iterator[Token]:
    """A text in pieces, without comments."""
    at, line = 0, 1
    while at < len(text):
        kind, end = _piece(text, at)
        if kind != "space":
            yield Token(kind, text[at:end], line)
        line += text.count("\n", at, end)
        at = end


def _piece(text: str, at: int) -> tuple[str, int]:
    for kind, pattern in (("space", SPACE), ("string", HEREDOC), ("name", NAME)):
        if found := pattern.match(text, at):
            return kind, found.end()
    if text[at] == '"':
        return "string", _end_of_string(text, at + 1)
    found = OPERATOR.match(text, at)
    return "operator", found.end() if found else at + 1


def _end_of_string(text: str, at: int) -> int:
    """Behind a string's last quote; what is interpolated may hold strings, too."""
    while at < len(text) and text[at] != '"':
        if text[at] == "\\":
            at += 2
        elif text.startswith(("${", "%{"), at) and not text.startswith(("$${", "%%{"), at - 1):
            at = _end_of_template(text, at + 2)
        else:
            at += 1
    return at + 1


def _end_of_template(text: str, at: int) -> int:
    depth = 1
    while at < len(text) and depth:
        if text[at] == '"':
            at = _end_of_string(text, at + 1)
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at


def _body(tokens: list[Token], at: int, block: Block) -> int:
    """Fill a block; where it ends."""
    while tokens[at].kind != "end" and tokens[at].text != "}":
        if tokens[at].text == "\n":
            at += 1
            continue
        if tokens[at].kind != "name":
            raise _refused(tokens[at])
        if tokens[at + 1].text == "=":
            block.arguments[tokens[at].text] = tokens[at].line
            at = _behind_expression(tokens, at + 2)
        else:
            at = _inner(tokens, at, block)
    return at


def _behind_expression(tokens: list[Token], at: int) -> int:
    depth = 0
    while tokens[at].kind != "end":
        text = tokens[at].text
        if not depth and text in ("\n", "}"):
            return at
        if tokens[at].kind == "operator":
            depth += (text in OPENING) - (text in CLOSING)
        at += 1
    if depth:
        raise _refused(tokens[at])
    return at


def _inner(tokens: list[Token], at: int, block: Block) -> int:
    first, labels = tokens[at], []
    at += 1
    while tokens[at].kind in ("string", "name"):
        labels.append(tokens[at].text.strip('"'))
        at += 1
    if tokens[at].text != "{":
        raise _refused(tokens[at])
    inner = Block(first.text, tuple(labels), first.line)
    block.blocks.append(inner)
    at = _body(tokens, at + 1, inner)
    if tokens[at].text != "}":
        raise _refused(tokens[at])
    return at + 1


def _refused(token: Token) -> ValueError:
    return ValueError(token.line, f"{token.text.strip() or 'the end of the line'!r} was not expected here")
