"""The interpreter itself, on kernels written by hand and on values known otherwise."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx import alu, warp
from ptx.machine import Machine
from ptx.memory import Arena, PtxError, RaceError, StaleError
from ptx.parse import parse

HEAD = """
.version 8.0
.target sm_80
.visible .entry kernel(.param .u64 data) .reqntid 32
{
  .reg .pred %p<4>;
  .reg .b32 %r<20>;
  .reg .b64 %rd<20>;
  ld.param.b64 %rd1, [data];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  setp.eq.b32 %p1, %r2, 0;
"""


def run(body, *, grid=1, words=64, seed=0, **options):
    """The words of `data`, at an address that no test asks for, after the kernel."""
    arena = Arena([(1 << 20, 4 * words, "data")], 4)
    arena.data[:] = 0
    kernel = parse(HEAD + body + "\n}\n")
    parameters = {"data": (1 << 20).to_bytes(8, "little")}
    Machine(kernel, grid, parameters, arena, 1024, seed=seed, resident=True, **options).run()
    place = arena.regions()[0][1]
    return arena.data[place : place + 4 * words].view(np.int32)


NEIGHBOURS = """
  @%p1 bra $L_reader;
  mov.b32 %r5, 7;
  st.global.b32 [%rd1+4], %r5;
  bar.sync 0;
  setp.eq.b32 %p2, %r1, 0;
  @%p2 atom.global.gpu.RELEASE.exch.b32 %r6, [%rd1+128], %r5;
  ret;
$L_reader:
  FIRST
$L_poll:
  ld.POLL.global.b32 %r8, [%rd1+128];
  setp.eq.b32 %p3, %r8, 0;
  @%p3 bra $L_poll;
  ld.global.b32 %r9, [%rd1+4];
  ret;
"""


def neighbours(first="", poll="volatile", release="release"):
    return NEIGHBOURS.replace("FIRST", first).replace("POLL", poll).replace("RELEASE", release)


@pytest.mark.parametrize("seed", range(5))
def test_a_sector_that_l1_holds_is_stale(seed):
    """Its neighbour was read before: the line is there, without what was written since; an acquire empties L1."""
    first = "ld.global.b32 %r7, [%rd1];"
    run(neighbours(), grid=2, seed=seed)
    run(neighbours(first, poll="acquire"), grid=2, seed=seed)
    found = 0
    for s in range(10):
        try:
            run(neighbours(first), grid=2, seed=10 * seed + s)
        except StaleError:
            found += 1
    assert found > 0


def test_a_release_and_an_acquire_order_also_by_ptx_alone():
    run(neighbours(poll="acquire"), grid=2, volatile_acquires=False)
    for body in (neighbours(), neighbours(poll="acquire", release="relaxed")):
        with pytest.raises(RaceError):
            run(body, grid=2, volatile_acquires=False)


@pytest.mark.parametrize("seed", range(3))
def test_atomics_lose_nothing(seed):
    body = "mov.b32 %r5, 3;\n red.global.gpu.relaxed.add.u32 [%rd1], %r5;\n ret;"
    assert run(body, grid=5, seed=seed)[0] == 5 * 32 * 3


def test_branches_rejoin():
    body = """
      mov.b32 %r5, 0;
    $L_loop:
      add.s32 %r5, %r5, 1;
      setp.lt.s32 %p2, %r5, %r1;
      @%p2 bra $L_loop;
      redux.sync.add.s32 %r6, %r5, -1;
      mad.wide.s32 %rd2, %r1, 4, %rd1;
      st.global.b32 [%rd2], %r6;
      ret;"""
    assert (run(body)[:32] == sum(max(lane, 1) for lane in range(32))).all()


def test_different_values_at_one_place():
    with pytest.raises(PtxError, match="different values"):
        run("st.global.b32 [%rd1], %r1;\n ret;")


def test_shuffles():
    x = np.arange(64, dtype=np.uint32)
    full, none = np.full(64, 31), np.zeros(64, int)
    assert (warp.shuffle("bfly", x, np.full(64, 5), full)[0] == x ^ 5).all()
    up = warp.shuffle("up", x, np.full(64, 4), none)[0]
    assert (up == np.where(x % 32 >= 4, x - 4, x)).all()
    assert (warp.shuffle("idx", x, np.full(64, 9), full)[0] == x // 32 * 32 + 9).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_tensor_core_fragments(kind):
    """Fragments laid out by PTX's formulas, one element after the other, against a product of matrices."""
    random = np.random.default_rng(0)
    A, B = random.integers(-4, 5, (16, 16)).astype(np.float32), random.integers(-4, 5, (16, 8)).astype(np.float32)

    def pack(low, high):
        if kind == "f16":
            bits = [int(np.float16(x).view(np.uint16)) for x in (low, high)]
        else:
            bits = [int(np.float32(x).view(np.uint32)) >> 16 for x in (low, high)]
        return bits[0] | bits[1] << 16

    a, b = np.zeros((4, 32), np.uint32), np.zeros((2, 32), np.uint32)
    for lane in range(32):
        group, inside = lane >> 2, lane % 4
        for i in range(0, 8, 2):  # a_i, a_i+1
            row = group if i in (0, 1, 4, 5) else group + 8
            col = inside * 2 + (0 if i < 4 else 8)
            a[i // 2, lane] = pack(A[row, col], A[row, col + 1])
        for i in range(0, 4, 2):
            row = inside * 2 + (0 if i < 2 else 8)
            b[i // 2, lane] = pack(B[row, group], B[row + 1, group])
    d = warp.mma_16816(list(a), list(b), [np.zeros(32, np.float32)] * 4, kind)
    for lane in range(32):
        for i in range(4):
            assert d[i][lane] == (A @ B)[(lane >> 2) + 8 * (i // 2), lane % 4 * 2 + i % 2]


def test_tensor_core_fragments_of_tf32():
    """The same for numbers of 32 bits, whose last 13 do not count."""
    random = np.random.default_rng(0)
    A, B = random.integers(-4, 5, (16, 8)).astype(np.float32), random.integers(-4, 5, (8, 8)).astype(np.float32)
    a, b = np.zeros((4, 32), np.uint32), np.zeros((2, 32), np.uint32)
    for lane in range(32):
        group, inside = lane >> 2, lane % 4
        for i in range(4):  # a_i
            row, col = group if i in (0, 2) else group + 8, inside if i < 2 else inside + 4
            a[i, lane] = A[row, col].view(np.uint32) | 0x1FFF
        for i in range(2):
            b[i, lane] = B[inside if i == 0 else inside + 4, group].view(np.uint32) | 1
    d = warp.mma_1688(list(a), list(b), [np.ones(32, np.float32)] * 4)
    for lane in range(32):
        for i in range(4):
            assert d[i][lane] == (A @ B)[(lane >> 2) + 8 * (i // 2), lane % 4 * 2 + i % 2] + 1


def test_tensor_cores_cut_off():
    """What lies below the last bit of the largest of five terms is lost, whatever its sign."""
    unit, one = np.float32(2.0**-23), np.zeros((1, 8))
    one[0, 0] = 1
    for small, expected in ((0.75, 1.0), (1.0, 1 + 2.0**-23), (-0.75, 1.0)):
        assert warp.tensor_sum(one, np.float32(small * unit)[None])[0] == expected
    later = np.zeros((1, 8))
    later[0, [0, 1, 4]] = 0.75 * 2.0**-23, 0.75 * 2.0**-23, 1
    assert warp.tensor_sum(later, np.zeros(1, np.float32))[0] == 1 + 2.0**-23


def test_products_and_sums_are_rounded_once():
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(2000).astype(np.float32) for _ in range(2))
    c = (-a * b * (1 + random.integers(-3, 4, 2000) * 2.0**-24)).astype(np.float32)
    c[::3] = (random.standard_normal(len(c[::3])) * 2.0**-30).astype(np.float32)
    for x, y, z, found in zip(a, b, c, alu.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = np.float32(float(exact))
        candidates = [near, np.nextafter(near, np.float32(math.inf)), np.nextafter(near, np.float32(-math.inf))]
        best = min(abs(Fraction(float(v)) - exact) for v in candidates)
        assert abs(Fraction(float(found)) - exact) == best


def test_integers():
    def of(opcode, *operands):
        kinds, _, function = alu.compute(opcode)
        return function(*(np.array([x], alu.TYPES[kind]) for x, kind in zip(operands, kinds, strict=True)))[0]

    assert of("div.s32", -7, 2) == -3
    assert of("shr.s32", -8, 40) == -1
    assert of("shr.u32", 8, 40) == 0
    assert of("bfe.s32", 0b0110, 1, 2) == -1
    assert of("bfe.u32", 0xF0, 4, 4) == 15
    assert of("prmt.b32", 0x44332211, 0x88776655, 0x7610) == 0x88772211
    assert of("mul.hi.s32", -1, 1 << 30) == -1
    assert of("mul.wide.s32", -3, 1 << 30) == -3 << 30
    assert of("cvt.rzi.s32.f32", 3e9) == 2**31 - 1
    assert of("cvt.rzi.s32.f32", math.nan) == 0
    assert of("cvt.rzi.s32.f32", -2.7) == -2
    assert not of("setp.ne.f32", math.nan, 1.0)
    assert of("setp.neu.f32", math.nan, 1.0)
    assert of("max.f32", math.nan, 1.0) == 1.0


def test_fused_products_of_float64():
    """Against rational numbers, also where the product and the sum cancel; at most the last bit is wrong."""
    drawn = np.random.default_rng(5).standard_normal((3, 200)) * 2.0 ** np.arange(-100, 100)
    a, b, c = (np.concatenate([row, row]) for row in drawn)
    c[200:] = -(a * b)[200:]
    found = alu.compute("fma.rn.f64")[2](a, b, c)
    exact = np.array([float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)])
    assert (np.abs(found - exact) <= np.spacing(np.abs(exact))).all()
    assert (exact[200:] != 0).any()


def test_denormals_are_flushed_where_an_opcode_says_so():
    least = np.float32(1e-40)
    assert alu.compute("abs.ftz.f32")[2](least) == 0
    assert alu.compute("fma.rn.ftz.f32")[2](np.float32(1e-30), np.float32(1e-10), least) == 0
    assert alu.compute("fma.rn.f32")[2](np.array(1e-30, "f4"), np.array(1e-10, "f4"), np.array(0, "f4")) > 0
    assert alu.compute("ex2.approx.ftz.f32")[2](np.float32(-130)) == 0
    assert alu.compute("rcp.approx.ftz.f64")[2](np.array(3.0)) == pytest.approx(1 / 3, rel=2**-20)
