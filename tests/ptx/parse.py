"""The text of a PTX kernel as instructions in basic blocks.

Reads what LLVM's NVPTX back end and Triton's inline assembly write: one entry per module, registers declared at the top
of the function or of a nested scope, branches to labels. Line information is dropped.
"""

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
WIDTHS |= {f"{sign}{bits}": bits for sign in "us" for bits in (8, 16, 32, 64)}
ENDS = {"bra", "ret", "exit", "bar"}  # of a basic block; `bar.warp` does not end one


@dataclass(frozen=True)
class Register:
    name: str
    index: int
    bits: int


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Number:
    value: int  # of an integer, or the bits of a float
    float_bits: int = 0  # 32 or 64 if it was written as 0f... or 0d...


@dataclass(frozen=True)
class Address:
    base: object  # Register, Symbol or None
    offset: int


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass
class Instruction:
    opcode: str
    operands: tuple
    guard: Register | None
    negated: bool
    text: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def ends_block(self) -> bool:
        return self.parts[0] in ENDS and self.parts[:2] != ["bar", "warp"]


@dataclass
class Block:
    """Instructions that run one after another; the last may branch, leave or wait."""

    body: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int]  # name to bytes, in order
    threads: int
    blocks: list[Block]
    labels: dict[str, int]  # label to block
    widths: list[int]  # bits of every register
    text: str


class Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.registers: list[Register] = []
        self.scopes: list[dict[str, Register]] = [{}]
        self.families: list[dict[str, int]] = [{}]

    def declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            name = name.strip()
            if found := re.fullmatch(r"(%\w+)<(\d+)>", name):
                self.families[-1][found[1]] = WIDTHS[kind[1:]]
            else:
                self.scopes[-1][name] = self.new(name, WIDTHS[kind[1:]])

    def new(self, name: str, bits: int) -> Register:
        self.registers.append(Register(name, len(self.registers), bits))
        return self.registers[-1]

    def register(self, name: str) -> Register | None:
        for scope, family in zip(reversed(self.scopes), reversed(self.families), strict=True):
            if name in scope:
                return scope[name]
            stem = name.rstrip("0123456789")
            if stem in family and stem != name:
                scope[name] = self.new(name, family[stem])
                return scope[name]
        return None

    def operand(self, text: str) -> object:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in text[1:-1].split(",")))
        if text.startswith("["):
            base, sign, offset = re.fullmatch(r"\[\s*([^\s+\-\]]+)\s*([+-]?)\s*([^\]\s]*)\s*\]", text).groups()
            number = int(sign + offset, 0) if offset else 0
            return Address(self.operand(base), number)
        if (register := self.register(text)) is not None:
            return register
        if text.startswith("%"):
            return Special(text)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Number(int(text.rstrip("U"), 0))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Number(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Number(int(text[2:], 16), 64)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise NotImplementedError(f"operand {text!r}")

    def instruction(self, statement: str, line: int) -> Instruction:
        guard, rest = None, statement
        negated = False
        if found := re.match(r"@(!?)\s*([%\w]+)\s+", statement):
            negated, guard, rest = bool(found[1]), self.register(found[2]), statement[found.end() :]
            assert guard is not None, statement
        opcode, _, operands = rest.partition(" ")
        split = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if operands.strip() else []
        return Instruction(opcode, tuple(self.operand(o) for o in split), guard, negated, statement, line)


def parse(text: str) -> Kernel:
    """The only entry of a module."""
    head, _, body = text.partition("\n{")
    name = re.search(r"\.entry\s+(\w+)\(", head)
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if name is None or threads is None:
        raise ValueError("expected one .entry with .reqntid, got neither or one")
    parameters = {
        p[1]: WIDTHS[p[0]] // 8 for p in re.findall(r"\.param\s+\.(\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+(\w+)", head)
    }
    reader = Reader(text)
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", body))
    blocks, labels = [Block()], {}
    rest, line = "", head.count("\n") + 1
    for raw in body.split("\n"):
        line += 1
        code = raw.split("//")[0].strip()
        if code.startswith((".loc", ".file", ".pragma")) or not code:
            continue
        if code == "}" and len(reader.scopes) == 1:
            break
        rest += " " + re.sub(r"\s+", " ", code)
        while rest:
            rest = rest.lstrip()
            if found := re.match(r"([\w$]+):", rest):
                if found[1] in targets:
                    if blocks[-1].body:
                        blocks.append(Block())
                    labels[found[1]] = len(blocks) - 1
                rest = rest[found.end() :]
            elif rest.startswith("{"):
                reader.scopes.append({})
                reader.families.append({})
                rest = rest[1:]
            elif rest.startswith("}"):
                reader.scopes.pop()
                reader.families.pop()
                rest = rest[1:]
            elif ";" in rest:
                statement, _, rest = rest.partition(";")
                if statement.startswith(".reg"):
                    reader.declare(statement)
                else:
                    instruction = reader.instruction(statement.strip(), line)
                    blocks[-1].body.append(instruction)
                    if instruction.ends_block:
                        blocks.append(Block())
            else:
                break
    if not blocks[-1].body and len(blocks) - 1 not in labels.values():
        blocks.pop()
    widths = [register.bits for register in reader.registers]
    return Kernel(name[1], parameters, int(threads[1]), blocks, labels, widths, text)
