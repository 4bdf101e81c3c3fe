"""Exact arithmetic on text that nobody vouches for: a parser of its own with limits, values as sympy numbers.

    sum     = product (("+" | "-") product)*          atom = number | name | "pi" | "sqrt" "(" sum ")" | "(" sum ")"
    product = power (("*" | "/" | nothing) power)*    power = ("-" | "+")* atom ("^" power)?

A name is one letter a–z. "2a" and "3(a+b)" multiply; "a/2b" is ambiguous and refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

MOST_CHARACTERS = 300
MOST_TOKENS = 96
MOST_DEPTH = 12
MOST_DIGITS = 15  # of a number that is written out
MOST_ROOTS = 4  # the degree of what must be compared doubles with each
MOST_EXPONENT = 64
MOST_BITS = 2048  # of a power
DIGITS_COMPARED = 60

_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|([a-z]+)|([-+*/^()]))", re.ASCII)


class ExpressionError(Exception):
    """The text is no expression of the whitelist, exceeds a limit, or has no real value."""


@dataclass
class _Parser:
    tokens: list[str]
    values: Mapping[str, int]
    place: int = 0
    roots: int = 0
    names: set[str] = field(default_factory=set)

    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.next()
        if wanted and token not in wanted:
            raise ExpressionError(f"{token or 'the end'!r} where {' or '.join(wanted)} is needed")
        self.place += 1
        return token

    def sum(self, depth: int) -> sympy.Expr:
        if depth > MOST_DEPTH:
            raise ExpressionError(f"nested more than {MOST_DEPTH} deep")
        value = self.product(depth)
        while self.next() in ("+", "-"):
            sign = self.take()
            other = self.product(depth)
            value = value + other if sign == "+" else value - other
        return value

    def product(self, depth: int) -> sympy.Expr:
        value, divided = self.power(depth), False
        while (token := self.next()) and token not in "+-)":
            if token in "*/^":
                self.take("*", "/")
            elif divided or token[0] in "0123456789.":
                raise ExpressionError(f"a product without a sign before {token!r} is ambiguous")
            other = self.power(depth)
            if token == "/":
                if _near_zero(other):
                    raise ExpressionError("a division by 0")
                divided = True
            value = value / other if token == "/" else value * other
        return value

    def power(self, depth: int) -> sympy.Expr:
        if depth > MOST_DEPTH:
            raise ExpressionError(f"nested more than {MOST_DEPTH} deep")
        if self.next() in ("-", "+"):
            return -self.power(depth + 1) if self.take() == "-" else self.power(depth + 1)
        base = self.atom(depth)
        if self.next() != "^":
            return base
        self.take()
        return _power(base, self.power(depth + 1))

    def atom(self, depth: int) -> sympy.Expr:
        token = self.take()
        if token == "(":
            value = self.sum(depth + 1)
            self.take(")")
            return value
        if token == "sqrt":
            self.take("(")
            value = self.sum(depth + 1)
            self.take(")")
            self.roots += 1
            if self.roots > MOST_ROOTS:
                raise ExpressionError(f"more than {MOST_ROOTS} roots")
            if value.evalf(DIGITS_COMPARED) < 0:
                raise ExpressionError("the root of a negative number")
            return sympy.sqrt(value)
        if token == "pi":
            return sympy.pi
        if len(token) == 1 and token.isalpha():
            if token not in self.values:
                raise ExpressionError(f"{token!r} has no value")
            self.names.add(token)
            return sympy.Integer(self.values[token])
        if token and token[0] in "0123456789.":
            if sum(c != "." for c in token) > MOST_DIGITS:
                raise ExpressionError(f"a number of more than {MOST_DIGITS} digits")
            return sympy.Rational(token)
        raise ExpressionError(f"{token or 'the end'!r} where a value is needed")


def evaluate(text: str, values: Mapping[str, int] | None = None) -> sympy.Expr:
    """The exact real value of an expression; `values` are those of its names.

    Raises:
        ExpressionError: see there.
    """
    return evaluate_with_names(text, values or {})[0]


def evaluate_with_names(text: str, values: Mapping[str, int]) -> tuple[sympy.Expr, set[str]]:
    """(value, names that occur) of an expression.

    Raises:
        ExpressionError: see there.
    """
    parser = _Parser(_tokens(text), values)
    value = parser.sum(0)
    if parser.next():
        raise ExpressionError(f"{parser.next()!r} is left over")
    if not value.is_finite or not value.is_real:
        raise ExpressionError("no real value")
    return value, parser.names


def equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two values are provably the same number."""
    difference = left - right
    if difference == 0:
        return True
    if not _near_zero(difference):
        return False
    return sympy.expand(sympy.radsimp(difference)) == 0 or difference.equals(0) is True


def as_integer(value: sympy.Expr) -> int | None:
    """The integer a value is, or None."""
    if value.is_Rational:
        return int(value) if value.is_Integer else None
    nearest = sympy.Integer(round(value.evalf(DIGITS_COMPARED)))
    return int(nearest) if equal(value, nearest) else None


def _near_zero(value: sympy.Expr) -> bool:
    return value == 0 or abs(value.evalf(DIGITS_COMPARED)) < sympy.Float(10) ** -(DIGITS_COMPARED // 2)


def _tokens(text: str) -> list[str]:
    if len(text) > MOST_CHARACTERS:
        raise ExpressionError(f"longer than {MOST_CHARACTERS} characters")
    tokens, place, text = [], 0, text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ExpressionError(f"{text[place : place + 10]!r} is not understood")
        tokens.append(match[1] or match[2] or match[3])
        place = match.end()
    if not tokens or len(tokens) > MOST_TOKENS:
        raise ExpressionError("empty" if not tokens else f"more than {MOST_TOKENS} numbers and signs")
    return tokens


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if not exponent.is_Integer or abs(exponent) > MOST_EXPONENT:
        raise ExpressionError(f"an exponent that is no integer up to {MOST_EXPONENT}")
    if base == 0 and exponent <= 0:
        raise ExpressionError("a power of 0 that has no value")
    if base.is_Rational:
        if abs(exponent) * max(base.p.bit_length(), base.q.bit_length()) > MOST_BITS:
            raise ExpressionError(f"a power of more than {MOST_BITS} bits")
    elif abs(exponent) > 8:
        raise ExpressionError("an irrational number to a power of more than 8")
    return base**exponent
