"""What an instruction does with values alone: PTX ISA 8.8, "Arithmetic", "Comparison", "Logic", "Conversion".

`compute(opcode)` gives the types of the operands, that of the result and a function of arrays over the threads. Every
value is computed for all threads and kept for those that take part, so nothing here may fail on garbage. Products and
sums that ptxas may contract are not contracted; approximate functions are rounded correctly.
"""

import re
from collections.abc import Callable

import numpy as np

TYPES = {"pred": np.dtype(bool), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
for _bits in (8, 16, 32, 64):
    TYPES[f"b{_bits}"] = TYPES[f"u{_bits}"] = np.dtype(f"u{_bits // 8}")
    TYPES[f"s{_bits}"] = np.dtype(f"i{_bits // 8}")

Operation = tuple[list[str], str, Callable]  # operand types, result type, function


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: the float64 sum is rounded to odd, after which rounding again is harmless."""
    product = a.astype(np.float64) * b
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    odd = (rest != 0) & ((bits & 1) == 0) & np.isfinite(total)
    step = np.where((rest > 0) == (total > 0), 1, -1)
    return np.where(odd, bits + step, bits).view(np.float64).astype(np.float32)


def fma_double(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float64 with what rounding the product leaves (Dekker 1971), rounded last: wrong by one bit at most,
    and without the rest where parts of a or b overflow."""
    product = a * b
    total = product + c
    high_a, high_b = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    rest = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    part = total - product
    rest += (product - (total - part)) + (c - part)
    return np.where(np.isfinite(rest), total + rest, total)


def rough_reciprocal(a: np.ndarray) -> np.ndarray:
    """1 / a in the upper half of a float64, as little as rcp.approx.ftz.f64 promises; denormals count as 0."""
    wide = 1 / flush(a)
    return (wide.view(np.int64) & np.int64(-1 << 32)).view(np.float64)


def flush(a: np.ndarray) -> np.ndarray:
    """Denormals as zeros of their sign."""
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)


def power_of_two(a: np.ndarray) -> np.ndarray:
    return np.exp2(a.astype(np.float64)).astype(np.float32)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero, as integers are divided; by 0 anything."""
    safe = np.where(b == 0, 1, b)
    quotient = np.abs(a) // np.abs(safe)
    return np.where((a < 0) != (safe < 0), -quotient, quotient).astype(a.dtype)


def shift_left(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    return np.where(n >= bits, 0, a << np.minimum(n, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n >= bits, 0, shifted).astype(a.dtype)


def bit_field(a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    at, length = at & 0xFF, length & 0xFF
    wide = a.astype(np.int64)
    field = (wide >> np.minimum(at, 63).astype(np.int64)) & ((np.int64(1) << np.minimum(length, 62)) - 1)
    if a.dtype.kind == "i":
        top = np.minimum(at + length - 1, bits - 1).astype(np.int64)
        negative = ((wide >> top) & 1).astype(bool) & (length > 0)
        field = np.where(negative, field | (np.int64(-1) << np.minimum(length, 62)), field)
    return field.astype(a.dtype)


def permute(a: np.ndarray, b: np.ndarray, control: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(both)
    for i in range(4):
        choice = (control >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (both >> ((choice & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        byte = np.where(choice & 8, np.where(byte & np.uint64(0x80), 0xFF, 0), byte).astype(np.uint64)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = {np.dtype("i4"): np.int64, np.dtype("u4"): np.uint64}[a.dtype]
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def to_integer(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Saturates; NaN becomes 0."""
    limits = np.iinfo(dtype)
    wide = np.where(np.isnan(value), 0.0, value.astype(np.float64))
    inside = np.clip(wide, float(limits.min), float(limits.max))
    exact = np.where((inside >= float(limits.max)) | (inside <= float(limits.min)), 0.0, inside).astype(dtype)
    return np.where(wide >= float(limits.max), limits.max, np.where(wide <= float(limits.min), limits.min, exact))


ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
COMPARE = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def compare(how: str, kind: str) -> Callable:
    """Ordered comparisons of floats are false of NaN, those that end in u are true of it."""
    if not kind.startswith("f"):
        return np.not_equal if how == "ne" else COMPARE[how]
    if how == "ne":
        return lambda a, b: (a < b) | (a > b)
    if how == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if how == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if how == "neu":
        return np.not_equal
    if how in COMPARE:
        return COMPARE[how]
    return lambda a, b: COMPARE[how[:-1]](a, b) | np.isnan(a) | np.isnan(b)


def convert(rounding: str, to: str, source: str) -> Callable:
    target = TYPES[to]
    if source.startswith("f") and not to.startswith("f"):
        return lambda a: to_integer(ROUND[rounding](a), target)
    if source.startswith("f") and rounding in ROUND:
        return lambda a: ROUND[rounding](a).astype(target)
    return lambda a: a.astype(target)


FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax}
INTEGER = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and}
INTEGER |= {"or": np.bitwise_or, "xor": np.bitwise_xor, "div": divide}
UNARY = {"abs": np.abs, "neg": np.negative, "not": np.invert}
FUNCTIONS = {
    r"(add|sub|mul)(?:\.rn)?\.(f\d+)": lambda op, t: ([t, t], t, FLOAT[op]),
    r"(div)\.(?:rn|full)\.(f32)": lambda op, t: ([t, t], t, FLOAT[op]),
    r"(min|max)\.(f\d+)": lambda op, t: ([t, t], t, FLOAT[op]),
    r"(?:min|max)\.NaN\.f32": None,  # not needed yet
    r"(add|sub|min|max|div)\.([us]\d+)": lambda op, t: ([t, t], t, INTEGER[op]),
    r"(and|or|xor)\.(b\d+|pred)": lambda op, t: ([t, t], t, INTEGER[op]),
    r"(abs|neg)\.([sf]\d+)": lambda op, t: ([t], t, UNARY[op]),
    r"abs\.ftz\.(f32)": lambda t: ([t], t, lambda a: np.abs(flush(a))),
    r"fma\.rn\.ftz\.(f32)": lambda t: ([t] * 3, t, lambda a, b, c: flush(fma(flush(a), flush(b), flush(c)))),
    r"(not)\.(b\d+|pred)": lambda op, t: ([t], t, UNARY[op]),
    r"fma\.rn\.(f32)": lambda t: ([t] * 3, t, fma),
    r"fma\.rn\.(f64)": lambda t: ([t] * 3, t, fma_double),
    r"rcp\.approx\.ftz\.(f64)": lambda t: ([t], t, rough_reciprocal),
    r"mul\.lo\.([us]\d+)": lambda t: ([t, t], t, np.multiply),
    r"mul\.hi\.([us]32)": lambda t: ([t, t], t, high_product),
    r"mad\.lo\.([us]\d+)": lambda t: ([t] * 3, t, lambda a, b, c: a * b + c),
    r"mul\.wide\.([us])(16|32)": lambda s, n: (
        [s + n] * 2,
        f"{s}{2 * int(n)}",
        lambda a, b: a.astype(TYPES[f"{s}{2 * int(n)}"]) * b,
    ),
    r"mad\.wide\.([us])(16|32)": lambda s, n: (
        [s + n, s + n, f"{s}{2 * int(n)}"],
        f"{s}{2 * int(n)}",
        lambda a, b, c: a.astype(TYPES[f"{s}{2 * int(n)}"]) * b + c,
    ),
    r"shl\.(b\d+)": lambda t: ([t, "u32"], t, shift_left),
    r"shr\.([busf]\d+)": lambda t: ([t, "u32"], t, shift_right),
    r"bfe\.([us]\d+)": lambda t: ([t, "u32", "u32"], t, bit_field),
    r"prmt\.b32": lambda: (["b32"] * 3, "b32", permute),
    r"popc\.(b\d+)": lambda t: ([t], "u32", lambda a: np.bitwise_count(a).astype(np.uint32)),
    r"selp\.(\w+)": lambda t: ([t, t, "pred"], t, lambda a, b, p: np.where(p, a, b)),
    r"setp\.(\w+)\.(\w+)": lambda how, t: ([t, t], "pred", compare(how, t)),
    r"mov\.([busf]\d+|pred)": lambda t: ([t], t, lambda a: a),
    r"sqrt\.rn\.(f32)": lambda t: ([t], t, np.sqrt),
    r"rsqrt\.approx\.ftz\.(f32)": lambda t: ([t], t, lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)),
    r"ex2\.approx\.(f32)": lambda t: ([t], t, power_of_two),
    r"ex2\.approx\.ftz\.(f32)": lambda t: ([t], t, lambda a: flush(power_of_two(flush(a)))),
    r"cvt\.(?:(r\w+)\.)?([usf]\d+)\.([usf]\d+)": lambda r, to, source: ([source], to, convert(r, to, source)),
}
FUNCTIONS = {re.compile(pattern): build for pattern, build in FUNCTIONS.items()}


def compute(opcode: str) -> Operation | None:
    for pattern, build in FUNCTIONS.items():
        if found := pattern.fullmatch(opcode):
            return build(*found.groups())
    return None
