"""From the text of an expression to its tree.

Owns tokens, grammar and every bound on the text: its length, how deep it nests, how deep the tree is. Whatever the
text, the outcome is a tree or a FilterError.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

from msgspec import Struct

from routing.cel.errors import FilterError
from routing.cel.values import MAX_INT, MAX_UINT, MIN_INT, UInt

MAX_CHARACTERS: Final = 4096
# brackets, braces and parentheses inside each other; the parser takes five Python frames for each
MAX_NESTING: Final = 50
# names, constants and operators; with them the time to compile is bounded
MAX_NODES: Final = 800
# with brackets, commas and dots
MAX_TOKENS: Final = 2_000
MAX_MACROS: Final = 100
# levels of the tree: one Python frame each when it is evaluated
MAX_DEPTH: Final = 100
_SPLIT: Final = "Split the rule into several routes."

# ---------------------------------------------------------------- the tree; `at` is an offset into the text


class Literal(Struct, frozen=True):
    at: int
    value: Any


class Ident(Struct, frozen=True):
    """`absolute` (a leading dot) looks past the variables of macros."""

    at: int
    name: str
    absolute: bool = False


class Select(Struct, frozen=True):
    at: int
    operand: "Node"
    field: str


class Has(Struct, frozen=True):
    at: int
    operand: "Node"
    field: str


class Index(Struct, frozen=True):
    at: int
    operand: "Node"
    key: "Node"


class Call(Struct, frozen=True):
    at: int
    name: str
    args: tuple["Node", ...]


class Method(Struct, frozen=True):
    at: int
    operand: "Node"
    name: str
    args: tuple["Node", ...]


class Unary(Struct, frozen=True):
    at: int
    op: str
    operand: "Node"


class Binary(Struct, frozen=True):
    at: int
    op: str
    left: "Node"
    right: "Node"


class Logic(Struct, frozen=True):
    """`&&` or `||` over two or more operands: flat, for a chain of a thousand is no deeper than one of two."""

    at: int
    op: str
    operands: tuple["Node", ...]


class Conditional(Struct, frozen=True):
    at: int
    test: "Node"
    then: "Node"
    other: "Node"


class ListOf(Struct, frozen=True):
    at: int
    items: tuple["Node", ...]


class MapOf(Struct, frozen=True):
    at: int
    entries: tuple[tuple["Node", "Node"], ...]


class Macro(Struct, frozen=True):
    """`over.kind(variable, body)`; `keep` is the condition of the three-argument `map`."""

    at: int
    kind: str
    over: "Node"
    variable: str
    body: "Node"
    keep: "Node | None" = None


Node: TypeAlias = (
    Literal
    | Ident
    | Select
    | Has
    | Index
    | Call
    | Method
    | Unary
    | Binary
    | Logic
    | Conditional
    | ListOf
    | MapOf
    | Macro
)

MACROS: Final = frozenset({"all", "exists", "exists_one", "existsOne", "map", "filter"})


def children(node: Node) -> Sequence[Node]:
    match node:
        case Literal() | Ident():
            return ()
        case Select() | Has() | Unary():
            return (node.operand,)
        case Index():
            return (node.operand, node.key)
        case Call():
            return node.args
        case Method():
            return (node.operand, *node.args)
        case Binary():
            return (node.left, node.right)
        case Logic():
            return node.operands
        case Conditional():
            return (node.test, node.then, node.other)
        case ListOf():
            return node.items
        case MapOf():
            return [part for entry in node.entries for part in entry]
        case Macro():
            return (node.over, node.body) if node.keep is None else (node.over, node.keep, node.body)


def nodes(root: Node) -> Iterator[Node]:
    """Every node of the tree, without recursion."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(children(node))


# ---------------------------------------------------------------- tokens

_TOKEN: Final = re.compile(
    r"""
    (?P<space>[ \t\n\r\f]+|//[^\n]*)
  | (?P<text>[bB]?[rR](?:'''[\s\S]*?'''|\"\"\"[\s\S]*?\"\"\"|'[^'\r\n]*'|"[^"\r\n]*")
            |[rR][bB](?:'''[\s\S]*?'''|\"\"\"[\s\S]*?\"\"\"|'[^'\r\n]*'|"[^"\r\n]*")
            |[bB]?(?:'''(?:[^\\]|\\[\s\S])*?'''|\"\"\"(?:[^\\]|\\[\s\S])*?\"\"\"
                    |'(?:[^'\\\r\n]|\\[^\r\n])*'|"(?:[^"\\\r\n]|\\[^\r\n])*"))
  | (?P<double>[0-9]*\.[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)
  | (?P<int>(?:0[xX][0-9a-fA-F]+|[0-9]+)[uU]?)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<quoted>`[A-Za-z0-9_.\-/ ]+`)
  | (?P<op>&&|\|\||==|!=|<=|>=|[-+*/%!<>?:.,()\[\]{}])
    """,
    re.VERBOSE,
)

_RESERVED: Final = frozenset(
    {"as", "break", "const", "continue", "else", "for", "function", "if", "import"}
    | {"let", "loop", "package", "namespace", "return", "var", "void", "while"}
)
_WORDS: Final = frozenset({"true", "false", "null", "in"})
_OTHER_LANGUAGES: Final = {"and": "&&", "or": "||", "not": "!", "AND": "&&", "OR": "||", "NOT": "!", "is": "=="}

_ESCAPE: Final = re.compile(
    r"\\(?:[xX][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-3][0-7]{2}|[abfnrtv\\?\"'`]|[\s\S]?)"
)
_SIMPLE: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class _Token(Struct, frozen=True):
    kind: str  # text, double, int, name, quoted, op, end
    text: str
    at: int

    @property
    def shown(self) -> str:
        return "the end" if self.kind == "end" else f"`{self.text[:30]}`"


def _fault_in_text(source: str, at: int) -> FilterError:
    """What to say of a character that starts no token."""
    rest = source[at:]
    character = rest[0]
    if character == "=":
        return FilterError(source, at, "`=` is no operator", "Write == to compare.")
    if character in "&|":
        return FilterError(source, at, f"`{character}` is no operator", f"Write {character * 2}.")
    if character in "'\"" or re.match(r"[bBrR]{1,2}['\"]", rest):
        return FilterError(source, at, "this text has no end", "Close it with the same quote on the same line.")
    if character == "`":
        return FilterError(
            source, at, "this quoted field has no end or holds a character that backticks cannot", 'Write ["field"].'
        )
    if character in "“”‘’«»":
        return FilterError(source, at, "a typographic quote is no quote", "Write \" or '.")
    name = character if character.isprintable() else f"U+{ord(character):04X}"
    return FilterError(source, at, f"the character {name} has no meaning here", "Texts stand in quotes.")


def _tokens(source: str) -> list[_Token]:
    found: list[_Token] = []
    at = 0
    while at < len(source):
        match = _TOKEN.match(source, at)
        if match is None:
            raise _fault_in_text(source, at)
        kind = match.lastgroup or ""
        if kind != "space":
            found.append(_Token(kind, match.group(), at))
        at = match.end()
    if len(found) > MAX_TOKENS:
        raise FilterError(source, found[MAX_TOKENS].at, f"more than {MAX_TOKENS} words and signs", _SPLIT)
    found.append(_Token("end", "", len(source)))
    return found


def _unquote(source: str, token: _Token) -> str | bytes:
    """The value of a text or bytes literal."""
    prefix = re.match(r"[bBrR]*", token.text)
    length = prefix.end() if prefix else 0
    flags = token.text[:length].lower()
    body = token.text[length:]
    quote = 3 if body[:3] in ("'''", '"""') and len(body) >= 6 else 1
    start = token.at + length + quote
    body = body[quote:-quote]
    if quote == 3:
        body = body.replace("\r\n", "\n").replace("\r", "\n")  # as the language's own lexer reads line ends
    wants_bytes = "b" in flags
    if "r" in flags:
        return body.encode() if wants_bytes else body
    if "\\" not in body:
        return body.encode() if wants_bytes else body
    pieces: list[bytes] = []
    last = 0
    for match in _ESCAPE.finditer(body):
        pieces.append(body[last : match.start()].encode())
        last = match.end()
        code = match.group()[1:]
        at = start + match.start()
        if len(code) == 1 and code in _SIMPLE:
            pieces.append(_SIMPLE[code].encode())
        elif len(code) == 1 and code in "\\?\"'`":
            pieces.append(code.encode())
        elif len(code) <= 1:
            raise FilterError(source, at, f"`\\{code}` is no escape", "Write \\\\, or r'…' for raw text.")
        else:
            number = int(code, 8) if code[0].isdigit() else int(code[1:], 16)
            if wants_bytes:
                if code[0] in "uU":
                    raise FilterError(source, at, f"`\\{code}` cannot stand in bytes", "Write \\x and two hex digits.")
                pieces.append(bytes((number,)))
            elif number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
                raise FilterError(source, at, f"`\\{code}` is no character of Unicode")
            else:
                pieces.append(chr(number).encode())
    pieces.append(body[last:].encode())
    joined = b"".join(pieces)
    return joined if wants_bytes else joined.decode()


# ---------------------------------------------------------------- the grammar

# binary operators by how tightly they bind; all of them group from the left
_BINDS: Final = {
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "in"), 0),
    **dict.fromkeys(("+", "-"), 1),
    **dict.fromkeys(("*", "/", "%"), 2),
}
_POSTFIX: Final = frozenset({".", "[", "{"})
_CONSTANTS: Final = frozenset({"int", "double", "text"})
_ENDS: Final = frozenset({",", "]", "}", ")", ":"})


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.tokens = _tokens(source)
        self.position = 0
        self.nesting = 0
        self.macros = 0

    def fault(self, at: int, message: str, remedy: str = "") -> FilterError:
        return FilterError(self.source, at, message, remedy)

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def take(self) -> _Token:
        token = self.tokens[self.position]
        self.position += 1
        return token

    def accept(self, op: str) -> bool:
        token = self.token
        if token.kind == "op" and token.text == op:
            self.position += 1
            return True
        return False

    def expect(self, op: str, why: str) -> None:
        if not self.accept(op):
            raise self.fault(self.token.at, f"expected `{op}` {why}, found {self.token.shown}", self.hint())

    def hint(self) -> str:
        token = self.token
        if token.kind == "name" and token.text in _OTHER_LANGUAGES:
            return f"Write {_OTHER_LANGUAGES[token.text]} instead of {token.text}."
        if token.kind in ("int", "double", "text", "name", "quoted"):
            return "Is an operator missing before it?"
        return ""

    def whole(self) -> Node:
        node = self.expression()
        if self.token.kind != "end":
            raise self.fault(self.token.at, f"{self.token.shown} does not belong here", self.hint())
        return node

    def expression(self) -> Node:
        # long rules are mostly lists of constants
        if self.tokens[self.position].kind in _CONSTANTS and self.tokens[self.position + 1].text in _ENDS:
            return self.primary(None)
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise self.fault(self.token.at, f"nested more than {MAX_NESTING} deep", _SPLIT)
        # `a ? b : c ? d : e` is read in a loop: only brackets cost frames
        tests: list[tuple[int, Node, Node]] = []
        while True:
            node = self.logic("||")
            at = self.token.at
            if not self.accept("?"):
                break
            then = self.expression()
            self.expect(":", "of this `?`")
            tests.append((at, node, then))
        for at, test, then in reversed(tests):
            node = Conditional(at, test, then, node)
        self.nesting -= 1
        return node

    def logic(self, op: str) -> Node:
        at = -1
        operands: list[Node] = []
        while True:
            operands.append(self.logic("&&") if op == "||" else self.binary(0))
            here = self.tokens[self.position]
            if here.text != op or here.kind != "op":
                break
            self.position += 1
            at = here.at if at < 0 else at
        return operands[0] if len(operands) == 1 else Logic(at, op, tuple(operands))

    def binary(self, level: int) -> Node:
        """Operators that bind at least as tightly as `level`."""
        node = self.unary()
        while True:
            operator = self.tokens[self.position]
            binds = _BINDS.get(operator.text, -1)
            if binds < level or operator.kind not in ("op", "name"):
                return node
            self.position += 1
            node = Binary(operator.at, operator.text, node, self.binary(binds + 1))

    def unary(self) -> Node:
        if self.tokens[self.position].text not in ("!", "-"):
            return self.postfix(None)
        signs: list[_Token] = []
        while self.token.kind == "op" and self.token.text in ("!", "-"):
            signs.append(self.take())
        if any(sign.text != signs[0].text for sign in signs):
            other = next(sign for sign in signs if sign.text != signs[0].text)
            raise self.fault(other.at, "`!` and `-` cannot stand side by side", "Put the inner one in parentheses.")
        negative = bool(signs) and signs[-1].text == "-" and self.token.kind in ("int", "double")
        node = self.postfix(signs.pop().at if negative else None)
        if len(signs) % 2 == 0 and len(signs) > 2:
            del signs[2:]  # two signs are as good as any even number, and keep the check that the operand suits them
        elif len(signs) > 2:
            del signs[1:]
        for sign in reversed(signs):
            node = Unary(sign.at, sign.text, node)
        return node

    def postfix(self, minus_at: int | None) -> Node:
        node = self.primary(minus_at)
        while self.tokens[self.position].text in _POSTFIX and self.token.kind == "op":
            at = self.token.at
            if self.accept("."):
                node = self.member(node)
            elif self.accept("["):
                key = self.expression()
                self.expect("]", "after the index")
                node = Index(at, node, key)
            elif self.token.text == "{" and isinstance(node, (Ident, Select)):
                raise self.fault(at, "messages cannot be built here", 'Write a map: {"key": value}.')
            else:
                break
        return node

    def member(self, operand: Node) -> Node:
        token = self.take()
        if token.kind == "quoted":
            return Select(token.at, operand, token.text[1:-1])
        if token.kind == "op" and token.text == "?":
            raise self.fault(token.at, "optional fields `.?` are not known", "Write has(a.b) && …")
        if token.kind != "name" or token.text in _WORDS:
            remedy = f'Write ["{token.text}"] for a field of this name.' if token.kind == "name" else ""
            raise self.fault(token.at, f"expected the name of a field after `.`, found {token.shown}", remedy)
        if not self.accept("("):
            return Select(token.at, operand, token.text)
        if token.text in MACROS:
            return self.macro(token, operand)
        return Method(token.at, operand, token.text, self.arguments(")"))

    def macro(self, name: _Token, over: Node) -> Node:
        args = self.arguments(")")
        if len(args) != 2 and not (name.text == "map" and len(args) == 3):
            raise self.fault(name.at, f"{name.text}() takes a variable and an expression", f"Write .{name.text}(x, …).")
        variable = args[0]
        if not isinstance(variable, Ident) or variable.absolute:
            raise self.fault(args[0].at, f"{name.text}() takes a plain name first", f"Write .{name.text}(x, …).")
        self.macros += 1
        if self.macros > MAX_MACROS:
            raise self.fault(name.at, f"more than {MAX_MACROS} macros", _SPLIT)
        kind = "exists_one" if name.text == "existsOne" else name.text
        return Macro(name.at, kind, over, variable.name, args[-1], args[1] if len(args) == 3 else None)

    def arguments(self, close: str) -> tuple[Node, ...]:
        """Up to and with the closing bracket; lists may end with a comma."""
        args: list[Node] = []
        if self.accept(close):
            return ()
        while True:
            args.append(self.expression())
            if self.accept(close):
                return tuple(args)
            self.expect(",", f"or `{close}`")
            if close == "]" and self.accept(close):
                return tuple(args)

    def primary(self, minus_at: int | None) -> Node:
        token = self.take()
        match token.kind:
            case "int" | "double":
                return self.number(token, minus_at)
            case "text":
                return Literal(token.at, _unquote(self.source, token))
            case "name":
                return self.name(token, absolute=False)
            case "op" if token.text == "(":
                node = self.expression()
                self.expect(")", "to close this parenthesis")
                return node
            case "op" if token.text == "[":
                return ListOf(token.at, self.arguments("]"))
            case "op" if token.text == "{":
                return self.map_of(token)
            case "op" if token.text == "." and self.token.kind == "name":
                return self.name(self.take(), absolute=True)
        self.position -= 1
        if token.kind == "end" and self.position == 0:
            raise self.fault(token.at, "the expression is empty", "Leave `where` out to let every event pass.")
        remedy = "Write == to compare." if token.text == "==" or self.source[token.at - 1 : token.at] == "=" else ""
        raise self.fault(token.at, f"expected a value, found {token.shown}", remedy)

    def number(self, token: _Token, minus_at: int | None) -> Node:
        at = token.at if minus_at is None else minus_at
        sign = 1 if minus_at is None else -1
        if token.kind == "double":
            return Literal(at, sign * float(token.text))
        text = token.text
        unsigned = text[-1] in "uU"
        digits = text[:-1] if unsigned else text
        if len(digits) > 40:
            raise self.fault(at, "this number has too many digits", "Write it as a double: 1e30.")
        value = int(digits, 16) if digits[:2] in ("0x", "0X") else int(digits)
        if unsigned:
            if minus_at is not None or value > MAX_UINT:
                raise self.fault(at, "this unsigned number is not within 0 to 2^64-1", "Leave out the u.")
            return Literal(at, UInt(value))
        if not MIN_INT <= sign * value <= MAX_INT:
            raise self.fault(at, "this number is not within 64 bits", f"Write it as a double: {digits}.0")
        return Literal(at, sign * value)

    def name(self, token: _Token, *, absolute: bool) -> Node:
        text = token.text
        if text in ("true", "false", "null") and not absolute:
            return Literal(token.at, {"true": True, "false": False, "null": None}[text])
        if text in _WORDS:
            raise self.fault(token.at, f"expected a value, found `{text}`")
        if text in _RESERVED:
            raise self.fault(token.at, f"`{text}` is a reserved word", f'A field of this name: payload["{text}"].')
        if text in ("not", "NOT") and self.token.kind in ("name", "text", "int"):
            raise self.fault(token.at, f"`{text}` is no operator", "Write ! instead.")
        if not self.accept("("):
            return Ident(token.at, text, absolute)
        args = self.arguments(")")
        if text != "has":
            return Call(token.at, text, args)
        if len(args) == 1:
            operand = args[0]
            if isinstance(operand, Select):
                return Has(token.at, operand.operand, operand.field)
            if isinstance(operand, Index) and isinstance(operand.key, Literal) and isinstance(operand.key.value, str):
                # beyond the language, which knows only has(a.b): for fields whose names need quotes
                return Has(token.at, operand.operand, operand.key.value)
        raise self.fault(token.at, "has() takes one field of a value", "Write has(payload.field).")

    def map_of(self, opened: _Token) -> Node:
        entries: list[tuple[Node, Node]] = []
        while not self.accept("}"):
            key = self.expression()
            self.expect(":", "after the key of a map")
            entries.append((key, self.expression()))
            if not self.accept(","):
                self.expect("}", "or `,`")
                break
        return MapOf(opened.at, tuple(entries))


def parse(source: str) -> Node:
    """The tree of an expression. Raises FilterError."""
    if len(source) > MAX_CHARACTERS:
        raise FilterError(
            source,
            MAX_CHARACTERS,
            f"{len(source)} characters, more than {MAX_CHARACTERS}",
            _SPLIT,
        )
    try:
        source.encode()
    except UnicodeEncodeError as fault:
        raise FilterError(source, fault.start, "half a character (a lone surrogate)") from None
    root = _Parser(source).whole()
    level: Sequence[Node] = (root,)
    count = 1
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in children(node)]
        if not level:
            return root
        count += len(level)
        if count > MAX_NODES:
            raise FilterError(source, level[0].at, f"more than {MAX_NODES} names, constants and operators", _SPLIT)
    raise FilterError(source, level[0].at, f"more than {MAX_DEPTH} operations inside each other", _SPLIT)
