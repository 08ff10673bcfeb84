"""Machine code of NVIDIA as cuobjdump prints it: loops, blocks, and the cycles of a warp by the control codes.

Bits 105 to 125 of an instruction say how long the next one waits, which of six counters a load holds until it has
arrived, and which of them the instruction waits for (Jia et al. 2018, for Volta; later architectures kept it). Loads
come in any order, so a counter tells that all it stands for are there, and no less: a load that was asked for just now
delays whoever waits for an older one with the same counter. ptxas gives them out, and this shows what it made of them.
"""

import re
from dataclasses import dataclass

from bench.model import H100

NO_COUNTER = 7


@dataclass(frozen=True)
class Instruction:
    at: int
    text: str
    stall: int  # cycles until the next one
    counter: int  # that it holds until its result is there
    waits: int  # bit mask of counters

    @property
    def target(self) -> int | None:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def parse(text: str) -> list[Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x[0-9a-f]+ \*/\s*/\* 0x([0-9a-f]+) \*/", text)
    codes = [(int(at, 16), line, int(high, 16) >> 41) for at, line, high in found]
    return [Instruction(at, line, code & 15, code >> 5 & 7, code >> 11 & 63) for at, line, code in codes]


def products(code: list[Instruction]) -> int:
    return sum("FFMA" in x.text for x in code)


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Those that multiply, the shortest first."""
    found = [
        [other for other in code if x.target <= other.at <= x.at]
        for x in code
        if x.target is not None and x.target < x.at
    ]
    return sorted((body for body in found if products(body) >= 4), key=len)


def blocks(code: list[Instruction]) -> list[list[Instruction]]:
    """Instructions between branches and their targets."""
    targets = {x.target for x in code}
    found: list[list[Instruction]] = [[]]
    for x in code:
        if x.at in targets:
            found.append([])
        found[-1].append(x)
        if x.target is not None:
            found.append([])
    return [block for block in found if block]


def cycles(block: list[Instruction], times: int = 1) -> int:
    """Of a warp that has its scheduler to itself, for the last of so many times; what L1 may serve it does."""
    arrived = [0] * 8
    now = started = 0
    for _ in range(times):
        started = now
        for x in block:
            now = max([now, *(arrived[i] for i in range(6) if x.waits >> i & 1)])
            trip = H100.l2_trip if "STRONG" in x.text else H100.l1_trip
            if "LDG" in x.text and x.counter != NO_COUNTER:
                arrived[x.counter] = max(arrived[x.counter], now + round(trip * H100.clock))
            now += max(x.stall, 1)
    return now - started
