"""python -m script_kernels.targets, and what it compiles: machine code, binaries, launches.

Other tests of the process may have turned Triton's interpreter on, so whatever compiles runs in a process of its own.
"""

import re

import pytest
import sass
from compiled_targets import ROOT, run

from bench.model import CHUNKS
from script_kernels import targets

pytest.importorskip("triton")


def test_no_kernel_is_missing_from_the_launch_tables():
    script = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
from script_kernels import targets
from script_kernels.triton import kernels as package
compiled = {launch.kernel.__name__ for launch in targets.collect()}
written = {
    name
    for info in pkgutil.iter_modules(package.__path__)
    for name, value in vars(importlib.import_module(f"{package.__name__}.{info.name}")).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}
assert written, "no kernel found"
assert compiled == written, compiled ^ written
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_prune_takes_six_launches():
    """Up to 1024 tokens, on a GPU of 132 processors; packed segments take one more, which places `keep`."""
    script = """
from types import SimpleNamespace
import torch
from script_kernels import targets
from script_kernels.options import PruneOptions
from script_kernels.triton.kernels import plan
from script_kernels.triton.prune import launch_prune
from script_kernels.triton.prune_varlen import launch_prune_varlen

torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
plan_greedy = plan.plan_greedy
plan.plan_greedy = lambda device, *sizes, **options: plan_greedy(torch.device("cuda"), *sizes, **options)


def count(call):
    with targets.recording("prune") as take:
        call()
        return len(take(""))


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


query, aligned = empty(1, 20, 768), empty(32, 576, 768)
print(count(lambda: launch_prune(empty(1, 576, 4096), empty(1, 20, 4096), 64, PruneOptions())))
print(count(lambda: launch_prune(empty(8, 1024, 1024), empty(8, 20, 1024), 128, PruneOptions())))
print(count(lambda: launch_prune(empty(32, 576, 1024), query, 64, PruneOptions(combine="restrict"), aligned=aligned)))
print(count(lambda: launch_prune(empty(1, 576, 4096), None, 64, PruneOptions())))
bounds = empty(6, dtype=torch.int32)
print(count(lambda: launch_prune_varlen(empty(2880, 4096), bounds, empty(5, 20, 4096), [32] * 5, PruneOptions())))
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "6", "6", "5", "7"]


EXCHANGE = """
import pathlib, subprocess, sys, tempfile
import triton
from script_kernels import targets

variants = ["64 stop of 128", "64 packed of 128", "256 tiers of 128", "1024 packed tiers of 128", "2048 stop of 32",
            "512 packed tiers of 32 bfloat16", "640 stop of 1", "1024 stop of 1"]
tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for launch in targets.collect(["greedy"], ("sm_80", "sm_90")):
    if launch.variant in variants:
        source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        target = targets.gpu_target(launch.target)
        compiled = triton.compile(source, target=target, options=launch.options.__dict__)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            print("variant", launch.variant, launch.target, flush=True)
            subprocess.run([tool, "-sass", file.name], check=True)
"""


def exchange_faults(code):
    """What an exchange of keys needs of the machine code and this code lacks."""
    faults = []
    swaps = [i for i, line in enumerate(code) if "ATOMG" in line and "EXCH.64" in line]
    if not swaps:
        faults.append("no exchange")
    for i in swaps:
        before = code[max(0, i - 6) : i]
        if not any("MEMBAR" in line and ".GPU" in line for line in before):
            faults.append("no fence before the exchange")
        if not any("BAR.SYNC" in line for line in code[:i]):
            faults.append("no barrier before the exchange")
    polls = [i for i, line in enumerate(code) if "LDG.E.64.STRONG.SYS" in line]
    rows = [i for i, line in enumerate(code) if re.search(r"LDG\.E(\.128)?\.STRONG\.GPU", line)]
    if not polls:
        faults.append("polls that L1 may serve")
    if len(rows) < 6:  # a chunk of rows of C, four a load, and what is left of them, one by one
        faults.append("entries of C that L1 may serve")
    if (
        polls
        and rows
        and not any("BAR.SYNC" in line for line in code[polls[-1] : min(i for i in rows if i > polls[-1])])
    ):
        faults.append("no barrier between polls and C")
    if any(re.search(r"\b(LDL|STL)\b", line) for line in code):
        faults.append("local memory")
    return faults


# Variant -> instructions of a warp (sm_90) for a chunk of rows of C, and for all else of a pick; `bench.model` counts
# with those of images.
LOOPS = {
    "64 packed of 128": (166, 663),
    "1024 packed tiers of 128": (114, 879),
    **{
        name: (chunk.instructions, chunk.others + chunk.half)
        for name, chunk in {
            "64 stop of 128": CHUNKS[64],
            "256 tiers of 128": CHUNKS[256],
            "640 stop of 1": CHUNKS[640],
            "1024 stop of 1": CHUNKS[1024],
            "2048 stop of 32": CHUNKS[2048],
        }.items()
    },
}
# Of those that ask for two chunks at once: the model counts the waits as well
TWICE = {"64 stop of 128": CHUNKS[64]}


def assert_asked_at_once(code, chunk):
    """C[:, j] of all rows of a chunk is asked for before the first is used; waits are those that the model counts."""
    body = sass.loops(code)[0]
    far = [i for i, x in enumerate(body) if "LDG.E.128.STRONG.GPU" in x.text]
    assert 4 * len(far) == chunk.rows
    assert far[-1] < next(i for i, x in enumerate(body) if "FFMA" in x.text)
    assert 0.95 * chunk.cycles <= sass.cycles(body, 3) <= chunk.cycles
    others = [x for x in sass.blocks(code) if x[0] not in body and sass.products(x) >= 32]
    half = max(others, key=lambda block: sum("STRONG" in x.text for x in block))  # that and what is left
    assert 0.95 * chunk.half <= len(half) <= chunk.half
    assert 0.95 * chunk.half_cycles <= sass.cycles(half) <= chunk.half_cycles


def test_machine_code_of_the_exchange():
    """What PTX does not promise and the exchange relies on, see kernels/greedy.py; and what a chunk of rows costs."""
    done = run("-c", EXCHANGE)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("variant ")[1:]
    assert len(found) == 16
    counted = set()
    for text in found:
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)
        assert len(code) > 500
        variant, _, target = text.partition("\n")[0].rpartition(" ")
        expected = ["no exchange", "polls that L1 may serve", "entries of C that L1 may serve"]
        assert exchange_faults(code) == (expected if variant.endswith("of 1") else []), (variant, target)
        if variant in LOOPS:  # fewer are welcome, and then the table and the model have to learn of it
            found_loops = sass.loops(sass.parse(text))
            chunk, pick = len(found_loops[0]), len(found_loops[-1])
            for counts, most in zip((chunk, pick - chunk), LOOPS[variant], strict=True):
                assert counts <= most, (variant, target, chunk, pick)
                assert counts >= 0.95 * most or target == "sm_80", (variant, chunk, pick)
            counted.add(variant)
        if variant in TWICE and target == "sm_90":
            assert_asked_at_once(sass.parse(text), TWICE[variant])
    assert counted == set(LOOPS)
    code = next(text for text in found if text.startswith("64 stop of 128 sm_90"))
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code)
    # Negative controls: the same code with one thing gone
    assert exchange_faults([line for line in code if "MEMBAR" not in line]) == ["no fence before the exchange"]
    weak = [re.sub(r"LDG\.E(\.128)?\.STRONG\.GPU", "LDG.E", line) for line in code]
    assert exchange_faults(weak) == ["entries of C that L1 may serve"]
    assert "polls that L1 may serve" in exchange_faults([line.replace(".STRONG.SYS", "") for line in code])
    assert "no barrier between polls and C" in exchange_faults([line for line in code if "BAR.SYNC" not in line])


def test_no_polled_key_is_read_by_two_warps_apart():
    """Two threads that read a key at two times may see different keys; a maximum over both would be either's."""
    script = """
from script_kernels import targets
for launch in targets.collect():
    names = launch.kernel.arg_names
    constants = {names[path[0]]: value for path, value in launch.constants.items()}
    if "BG" in constants and "p_slots" not in constants:
        print(constants["BG"], 32 * launch.options.num_warps)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) > 20
    assert all(keys == 32 or keys >= threads for keys, threads in found), found


BAD_KERNELS = """
import torch
import triton
import triton.language as tl
from script_kernels import targets


@triton.jit
def spilling_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    b_y = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(100):
        b_y += tl.load(p_y + i * BLOCK + o) * b_x
    tl.store(p_y + o, b_y + tl.sum(b_y, axis=0) * b_x)


@triton.jit
def wide_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_xy = o[:, None] * BLOCK + o[None, :]
    b_acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for i in range(8):
        b_x = tl.load(p_x + i * BLOCK * BLOCK + o_xy)
        b_acc = tl.dot(b_x, tl.trans(b_x), acc=b_acc)
    tl.store(p_y + o_xy, b_acc)


@triton.jit
def broken_kernel(p_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_x + tl.arange(0, BLOCK), tl.load(p_y + tl.arange(0, 2 * BLOCK)))


x = torch.empty(4096, dtype=torch.float32, device="meta")
half = torch.empty(4096, dtype=torch.float16, device="meta")
for call, name in (
    (lambda: spilling_kernel[(1,)](x, x, BLOCK=8192, num_warps=4, maxnreg=32), "sm_80"),
    (lambda: wide_kernel[(1,)](half, x, BLOCK=256, num_warps=16, num_stages=3), "sm_86"),
    (lambda: wide_kernel[(1,)](half, x, BLOCK=256, num_warps=16, num_stages=1, maxnreg=255), "sm_80"),
    (lambda: broken_kernel[(1,)](x, x, BLOCK=64), "sm_90"),
):
    with targets.recording("bad", name) as take:
        call()
        (launch,) = take("only")
    print(*targets.compile_launch(launch).problems)
"""


def test_problems_are_found(tmp_path):
    """Negative controls: kernels that spill, want too much shared memory or too many registers, or do not compile."""
    path = tmp_path / "bad_kernels.py"
    path.write_text(BAD_KERNELS)
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    spilling, wide, greedy, broken = done.stdout.splitlines()
    assert spilling.startswith("spills ")
    assert "shared memory of 101376" in wide
    assert re.search(r"needs \d+ registers for each of 512 threads, of 65536", greedy)
    assert broken.startswith("does not compile: ")


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        targets.main([])
    assert stopped.value.code != 0
    assert "TRITON_INTERPRET" in capsys.readouterr().err


STORM = """
from script_kernels import targets
from script_kernels.options import PruneOptions
from script_kernels.triton.prune import launch_prune
from script_kernels.triton.prune_varlen import launch_prune_varlen
import torch


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels(calls):
    with targets.recording("traffic") as take:
        for call in calls:
            call()
        return len({launch.key for launch in take("")})


sizes = [*range(1, 20), 33, 64, 100, 144, 256, 333, 400, 513, 576, 577, 729, 784, 1000, 1024, 1025, 1369, 2048]
sizes += [2880, 6000]
images = [(b, n, keep) for b in (1, 2, 3, 5, 8, 32) for n in sizes for keep in {1, -(-n // 9), n // 3 or 1}]
for share in (1, 2):
    print(kernels(
        lambda b=b, n=n, keep=keep: launch_prune(
            empty(b, n, 4096), empty(1 + (b - 1) % share, 20 + n % 7, 4096), keep, PruneOptions()
        )
        for b, n, keep in images
    ))
packed = [(s, t) for s in (1, 2, 5, 16, 33, 64) for t in sizes if t >= s]
print(kernels(
    lambda s=s, t=t: launch_prune_varlen(
        empty(t, 4096), empty(s + 1, dtype=torch.int32), empty(1, 20, 4096), [t // s // 9 or 1] * s, PruneOptions()
    )
    for s, t in packed
))
"""


def test_no_traffic_compiles_more_than_twelve_kernels():
    """Every compilation is a stall of seconds in a server: batches, lengths and counts of all kinds, one model."""
    done = run("-c", STORM)
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 3
    assert max(counts) <= 12, counts
    assert min(counts) >= 6, counts


def test_the_run_time_finds_what_was_compiled():
    """`targets` fills Triton's cache for the kernels that the run time will ask for: same source, same options."""
    script = """
import triton.compiler
from triton.runtime.driver import driver
from script_kernels import targets
from script_kernels.triton.tables import LAUNCHES

class Compiled:
    function = packed_metadata = None
    def launch_metadata(self, *arguments): pass
    def run(self, *arguments): pass

def compile(source, target, options, **_):
    asked.add((source.hash(), str(target), str(options)))
    return Compiled()

asked = set()
ours = {
    (triton.compiler.ASTSource(x.kernel, x.signature, x.constants, x.attributes).hash(),
     str(targets.gpu_target(x.target)), str(x.options.__dict__))
    for x in targets.collect(["prune"])
}
triton.compiler.compile = compile
for launch in targets.collect(["prune"]):
    launch.kernel.device_caches.clear()
driver._active = targets.Driver("sm_90")
for group, _, call in LAUNCHES:
    if group == "prune":
        call()
assert len(ours) > 6 and asked == ours, (len(asked), len(ours), len(asked & ours))
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_every_launch_fixes_the_fusion_of_products_and_sums():
    """Its default changes with Triton's version, and with it bits; `launch` is the one place that launches."""
    script = """
from script_kernels import targets
print({launch.options.enable_fp_fusion for launch in targets.collect()})
"""
    done = run("-c", script)
    assert done.stdout == "{True}\n", done.stderr
    folder = ROOT / "script_kernels" / "triton"
    launched = [p.name for p in folder.rglob("*.py") if re.search(r"\w+\[\(", p.read_text())]
    assert launched == ["layout.py"]


def test_unreadable_metadata_is_an_error():
    with pytest.raises(ValueError, match="vgpr_count"):
        targets.amd_usage("")
