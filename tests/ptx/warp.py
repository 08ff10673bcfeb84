"""What the lanes of a warp do together: shuffles, reductions, tensor cores (PTX ISA 8.8, "Warp-level matrix").

Arrays are over the threads of a CTA, and warps are their rows of 32.
"""

import numpy as np

LANES = np.arange(32)
REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum}
REDUCE |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

# Fragments of m16n8k16: lane l has rows g and g + 8 of A and D and column g of B; g = l / 4, c = l % 4.
_G, _C = LANES // 4, LANES % 4
_PAIR = 2 * _C[:, None] + np.arange(2)  # [lane, half of a register]
A_ROWS = np.stack([np.broadcast_to((_G + 8 * (r % 2))[:, None], (32, 2)) for r in range(4)], axis=1)
A_COLS = np.stack([_PAIR + 8 * (r // 2) for r in range(4)], axis=1)  # [lane, register, half]
B_ROWS = np.stack([_PAIR, _PAIR + 8], axis=1)
B_COLS = np.broadcast_to(_G[:, None, None], (32, 2, 2))
# m16n8k8 of TF32, one number a register
A8_ROWS, A8_COLS = np.stack([_G, _G + 8] * 2, axis=1), np.stack([_C, _C, _C + 4, _C + 4], axis=1)
B8_ROWS, B8_COLS = np.stack([_C, _C + 4], axis=1), np.stack([_G, _G], axis=1)
D_ROWS = np.stack([_G, _G, _G + 8, _G + 8], axis=1)  # [lane, register]
D_COLS = np.stack([2 * _C, 2 * _C + 1] * 2, axis=1)


def by_warp(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 32)


def shuffle(how: str, value: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value of another lane, and the lane it came from, [threads]."""
    lane = np.broadcast_to(LANES, (len(value) // 32, 32)).reshape(-1)
    by, clamp = by.astype(np.int64) & 31, clamp.astype(np.int64)
    segment = (clamp >> 8) & 31
    most = (lane & segment) | (clamp & 31 & ~segment)
    least = lane & segment
    source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": least | (by & ~segment)}[how]
    inside = source >= most if how == "up" else source <= most
    source = np.where(inside, source, lane)
    return np.take_along_axis(by_warp(value), by_warp(source), axis=1).reshape(-1), source


def reduce(how: str, value: np.ndarray) -> np.ndarray:
    found = REDUCE[how].reduce(by_warp(value), axis=1, dtype=value.dtype)
    return np.repeat(found, 32)


def halves(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """float32 [warp, lane, register, half] of registers that hold two 16-bit floats each."""
    packed = np.ascontiguousarray(np.stack([by_warp(r) for r in registers], axis=-1))
    pairs = packed.view(np.uint16).reshape(*packed.shape, 2)
    if kind == "bf16":
        return (pairs.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return pairs.view(np.float16).astype(np.float32)


def mma_16816(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], kind: str) -> list[np.ndarray]:
    """D = A B + C: products exact, their sum in float64, rounded once. A tensor core truncates in between."""
    warps = len(c[0]) // 32
    A, B, D = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    A[:, A_ROWS, A_COLS] = halves(a, kind)
    B[:, B_ROWS, B_COLS] = halves(b, kind)
    D[:, D_ROWS, D_COLS] = np.stack([by_warp(x) for x in c], axis=-1)
    found = (A @ B + D).astype(np.float32)[:, D_ROWS, D_COLS]
    return [np.ascontiguousarray(found[:, :, r]).reshape(-1) for r in range(4)]


def truncated(exact: np.ndarray) -> np.ndarray:
    """float32 of float64, rounded towards zero."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


def tensor_sum(products: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + the sum of exact products over the last axis, as a tensor core adds: four at a time, brought to the exponent
    of the largest without a bit to spare, and cut off (Fasi, Higham, Mikaitis, Pranesh 2021; the worst they found)."""
    for i in range(0, products.shape[-1], 4):
        terms = np.concatenate([products[..., i : i + 4], c[..., None].astype(np.float64)], axis=-1)
        last = np.exp2(np.frexp(np.abs(terms).max(axis=-1, keepdims=True))[1] - 24.0)
        c = truncated((np.trunc(terms / last) * last).sum(axis=-1))
    return c


def mma_1688(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """D = A B + C of TF32: the low 13 bits of a register do not count."""
    warps = len(c[0]) // 32
    A, B = np.zeros((warps, 16, 8)), np.zeros((warps, 8, 8))
    D = np.zeros((warps, 16, 8), np.float32)
    for whole, rows, cols, registers in ((A, A8_ROWS, A8_COLS, a), (B, B8_ROWS, B8_COLS, b)):
        bits = np.stack([by_warp(r) for r in registers], axis=-1) & np.uint32(0xFFFFE000)
        whole[:, rows, cols] = np.ascontiguousarray(bits).view(np.float32)
    D[:, D_ROWS, D_COLS] = np.stack([by_warp(x) for x in c], axis=-1)
    with np.errstate(invalid="ignore"):
        found = tensor_sum(A[:, :, None, :] * B.swapaxes(1, 2)[:, None, :, :], D)[:, D_ROWS, D_COLS]
    return [np.ascontiguousarray(found[:, :, r]).reshape(-1) for r in range(4)]


def spread_rows(rows: np.ndarray, matrices: int) -> list[np.ndarray]:
    """ldmatrix: rows [warp, 8 * matrices, 4 words] to a register each, in which lane l has word l % 4 of row l / 4."""
    return [np.ascontiguousarray(rows[:, 8 * i + _G, _C]).reshape(-1) for i in range(matrices)]
