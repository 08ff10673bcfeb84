"""Runs the fuzz targets of all ops with libFuzzer and prints what they did: python tests/fuzz/run.py --seconds 300.

The working corpus grows in build/fuzz/corpus, from the committed one on; --merge then writes a minimal one back to
tests/fuzz/corpus, an input a line, in hexadecimal digits. Ends with status 1 where a target fails, whose input lies
beside the working corpus.
"""

import argparse
import concurrent.futures
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests/fuzz/corpus"
WORK = ROOT / "build/fuzz"
OPS = (
    *("query_relevance", "bipartite_match", "gsp", "dpp_map"),
    *("qcsp", "mask_intersect", "prune", "prune_varlen", "max_min", "mmr"),
)
FLAGS = "-O2 -gline-tables-only -fsanitize=address,undefined -fno-sanitize-recover=all"
# An execution allocates some hundred times.
ASAN = {"ASAN_OPTIONS": "malloc_context_size=3:quarantine_size_mb=16:allocator_release_to_os_interval_ms=-1"}
LONGEST = 256  # bytes of an input: sizes and strides come first, values repeat what follows
DONE = re.compile(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/", re.MULTILINE)


def build() -> pathlib.Path:
    compiler = os.environ.get("FUZZ_CXX", "clang++")
    if shutil.which(compiler) is None:
        sys.exit(f"FUZZ_CXX: expected clang++ with libFuzzer, got {compiler}, which is not there")
    out = WORK / "libfuzzer"
    command = ["make", "-s", "-j2", "-C", str(ROOT / "tests/fuzz"), f"OUT={out}", f"CXX={compiler}", f"FLAGS={FLAGS}"]
    subprocess.run([*command, "targets"], check=True)
    return out


def fuzz(program: pathlib.Path, op: str, seconds: float) -> tuple[str, str, bool]:
    corpus = WORK / "corpus" / op
    corpus.mkdir(parents=True, exist_ok=True)
    committed = COMMITTED / f"{op}.txt"
    for line in committed.read_text().split() if committed.exists() else []:
        content = bytes.fromhex(line)
        (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)  # libFuzzer's own names
    options = [
        f"-max_total_time={max(1, int(seconds))}",
        f"-max_len={LONGEST}",
        "-len_control=0",
        "-entropic=0",  # its bookkeeping costs as much as a short call
        "-timeout=30",
        "-rss_limit_mb=3000",
    ]
    command = [program, *options, f"-artifact_prefix={corpus.parent}/{op}-", corpus]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | ASAN)
    return op, done.stderr, done.returncode == 0


def merge(program: pathlib.Path, op: str) -> int:
    """Replaces the committed corpus of an op by the least that reaches the same; returns the bytes of its file."""
    fresh = WORK / "merged" / op
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    given = [fresh, WORK / "corpus" / op]
    subprocess.run([program, "-merge=1", f"-max_len={LONGEST}", *given], stderr=subprocess.DEVNULL, check=True)
    lines = sorted((path.read_bytes().hex() for path in fresh.iterdir()), key=lambda line: (len(line), line))
    return (COMMITTED / f"{op}.txt").write_text("".join(f"{line}\n" for line in lines if line))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the whole run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--merge", action="store_true")
    given = parser.parse_args()
    programs = build()
    share = given.seconds * min(given.jobs, len(given.ops)) / len(given.ops)
    total, good = 0, True
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for run in concurrent.futures.as_completed([pool.submit(fuzz, programs / op, op, share) for op in given.ops]):
            op, log, passed = run.result()
            found = DONE.findall(log)
            good = good and passed and len(found) == 1
            if not (passed and found):
                print(f"{op}: failed\n{log[-4000:]}", flush=True)
                continue
            executions, edges, features, inputs = map(int, found[0])
            total += executions
            print(f"{op}: executions {executions}, edges {edges}, features {features}, inputs {inputs}", flush=True)
    print(f"all: executions {total}")
    if given.merge and good:
        print(f"corpus: {sum(merge(programs / op, op) for op in given.ops)} bytes")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
