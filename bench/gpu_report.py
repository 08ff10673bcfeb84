"""make gpu-report: builds, tests, sanitises and measures on the GPU of this machine, and writes one folder.

Needs a CUDA build of torch, Triton and nvcc in the Python that runs it; no network. Every part is a process of its own
with a time limit, so a part that fails or hangs leaves the others alone. Exit status: 0 if all parts passed (a target
that is missed is a line of the report, not a failure) and after a dry run, 1 if a part failed or there is no GPU.
"""

import argparse
import csv
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUDGET = 480.0  # seconds for everything
RESERVE = 15.0  # of them for the last writing
PASSED, FAILED, SKIPPED, LISTED = "passed", "FAILED", "skipped", "listed"


@dataclasses.dataclass(frozen=True)
class Step:
    """One part: a command and the seconds it may take."""

    name: str
    purpose: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shown(self) -> str:
        words = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*words, *(word.replace(sys.executable, "python3") for word in self.command)])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a step; `detail` says why it failed or was skipped, or what it found."""

    step: Step
    status: str
    seconds: float = 0.0
    detail: str = ""


def obstacle() -> str:
    """Why there is no GPU to measure on; empty if there is one."""
    code = (
        "import torch\n"
        "v = f'torch {torch.__version__}'\n"
        "print(f'{v} is built without CUDA' if torch.version.cuda is None else "
        "'' if torch.cuda.is_available() else f'{v} finds no CUDA device')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return "torch cannot be imported: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout.strip()


def device_name_and_architecture() -> tuple[str, str]:
    """("NVIDIA H100 80GB HBM3", "90") of the current device."""
    code = "import torch; print(torch.cuda.get_device_name()); print('%d%d' % torch.cuda.get_device_capability())"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[0], lines[1]


def cuda_tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit; its bare name where it is not found, so that running it says so."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or name


def steps(work: pathlib.Path, architecture: str) -> list[Step]:
    """All parts in order; the last one gets the time that the others leave."""
    python = sys.executable
    build = {"SCRIPT_KERNELS_CUDA": "1", "SCRIPT_KERNELS_CUDA_ARCHS": architecture}
    workers = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    # Without PyTorch's caching of freed memory, an access beyond a tensor is an access beyond an allocation.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def bench(part: str, *arguments: str) -> tuple[str, ...]:
        return (python, "-m", "bench.gpu_bench", part, "--out", str(work / f"{part}.json"), *arguments)

    def sanitizer(tool: str) -> Step:
        command = (
            cuda_tool("compute-sanitizer"),
            "--tool",
            tool,
            "--error-exitcode",
            "99",
            python,
            "-m",
            "bench.gpu_short",
        )
        return Step(tool, f"compute-sanitizer {tool} over every op", command, 26, uncached)

    tests = (python, "-m", "pytest", "-q", "-m", "gpu", *workers, f"--junitxml={work / 'tests.xml'}", "tests")
    ceilings = ("--ceilings", str(work / "ceilings.json"), "--csv", str(work / "results.csv"))
    # The preset that has targets; the others take as long again each: python -m bench.prefill
    prefill = (python, "-m", "bench.prefill", "--preset", "llava-next-7b", "--out", str(work / "prefill"))
    return [
        Step("build", "the libraries, with CUDA", (python, "setup.py", "build_ext", "--inplace"), 80, build),
        Step("facts", "device, driver and versions", bench("facts"), 20),
        # Without a sanitizer first: it compiles the Triton kernels that the sanitizers then only run.
        Step("short", "every op on a few shapes", (python, "-m", "bench.gpu_short"), 35),
        Step("tests", "every test marked gpu", tests, 100),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        sanitizer("synccheck"),
        Step("ceilings", "copy bandwidth and matrix rates", bench("ceilings"), 20),
        Step("steps", "time of a DPP step, launches of prune", bench("steps"), 30),
        Step("prefill", "whole models: time to first token with and without pruning", prefill, 60),
        Step("ops", "every op against the reference, in order of importance", bench("ops", *ceilings), BUDGET),
    ]


def run(step: Step, log: pathlib.Path) -> Outcome:
    """Runs one step to its end or its limit; its output goes to the log and, as it comes, to the terminal."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("a") as file:
        file.write(f"\n===== {step.name}: {step.shown}\n")
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n")
            return Outcome(step, FAILED, 0.0, str(error))
        try:
            code = process.wait(timeout=step.limit)
            reason = f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own process group: compilers and test workers end with it
            process.wait()
            code, reason = 1, f"stopped at its limit of {step.limit:.0f} s"
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome(step, PASSED, seconds)
    tail = [line for line in log.read_text(errors="replace")[begin:].splitlines() if line.strip()][-6:]
    return Outcome(step, FAILED, seconds, "\n".join([reason, *tail]))


def read_json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def refine(outcome: Outcome, work: pathlib.Path) -> Outcome:
    """Adds what a step's own files say: test counts, cases that failed or were left out."""
    if outcome.step.name == "tests" and (work / "tests.xml").exists():
        suite = xml.etree.ElementTree.parse(work / "tests.xml").getroot()
        counts = {
            key: sum(int(node.get(key, 0)) for node in suite.iter("testsuite"))
            for key in ("tests", "failures", "errors", "skipped")
        }
        text = ", ".join(f"{count} {key}" for key, count in counts.items())
        return dataclasses.replace(outcome, detail="\n".join(filter(None, [text, outcome.detail])))
    if outcome.step.name == "prefill":
        lines = []
        for path in sorted((work / "prefill").glob("*.csv")):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    names = ("llm_ms", "prune_ms", "first_token_ms", "llm_speedup", "gflops")
                    llm, pruning, first, faster, gflops = (float(row[name]) for name in names)
                    lines.append(
                        f"{row['preset']} keep {row['keep']}: prompt {row['prompt']}, LLM {llm:.2f} ms, "
                        f"pruning {pruning:.2f} ms, first token {first:.2f} ms, LLM with pruning {faster:.2f}x, "
                        f"{gflops:.0f} GFLOP"
                    )
        return dataclasses.replace(outcome, detail="\n".join(filter(None, [outcome.detail, *lines])))
    if outcome.step.name == "ops":
        found = read_json(work / "ops.json")
        lines = [f"{failure['case']}: {failure['error']}" for failure in found.get("failures", [])]
        status = FAILED if lines else outcome.status
        if found.get("left out"):
            lines.append(f"no time left for {len(found['left out'])} cases: {', '.join(found['left out'])}")
        return dataclasses.replace(outcome, status=status, detail="\n".join(filter(None, [outcome.detail, *lines])))
    return outcome


def execute(plan: list[Step], work: pathlib.Path, log: pathlib.Path, started: float) -> list[Outcome]:
    outcomes = []
    for step in plan:
        left = BUDGET - RESERVE - (time.monotonic() - started)
        limit = max(1.0, min(step.limit, left))
        if step.name == "ops":  # its last case may need a while after the time is up
            step = dataclasses.replace(step, command=(*step.command, "--seconds", f"{max(1.0, limit - 15):.0f}"))
        print(f"gpu-report: {step.name}: {step.purpose} (at most {limit:.0f} s)", flush=True)
        outcome = refine(run(dataclasses.replace(step, limit=limit), log), work)
        outcomes.append(outcome)
        print(f"gpu-report: {step.name}: {outcome.status} in {outcome.seconds:.0f} s", flush=True)
        if outcome.detail:
            print("  " + outcome.detail.replace("\n", "\n  "), flush=True)
    return outcomes


def default_folder(device: str) -> pathlib.Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{slug}-{datetime.date.today().isoformat()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the report (default bench/results/<gpu>-<date>)")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and run none of them")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    reason = obstacle()
    device, architecture = ("no GPU", "native") if reason else device_name_and_architecture()

    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        plan = steps(work, architecture)
        out = options.out or default_folder(device)
        if reason or options.dry_run:
            outcomes = [Outcome(step, SKIPPED if reason else LISTED, detail=reason) for step in plan]
            for number, outcome in enumerate(outcomes, 1):
                step = outcome.step
                print(f"{number}. {step.name}: {step.purpose}\n   {step.shown.replace(folder, 'WORK')}")
                print(f"   {outcome.status}" + (f": no GPU: {reason}" if reason else ""))
            if reason and not options.dry_run:
                print(f"gpu-report: nothing was measured: {reason}", file=sys.stderr)
                return 1
            return 0

        out.mkdir(parents=True, exist_ok=True)
        log = work / "log.txt"
        log.write_text("")
        outcomes = execute(plan, work, log, started)
        try:
            # Only now: it imports the package, which the first step builds.
            from bench import gpu_render

            gpu_render.write(outcomes, work, out, device, time.monotonic() - started)
        except Exception:
            traceback.print_exc()
            lines = [f"- {o.step.name}: {o.status}\n{o.detail}" for o in outcomes]
            (out / "report.md").write_text("\n".join(["The report failed:", traceback.format_exc(), *lines]))
            shutil.copyfile(log, out / "log.txt")
            return 1
    failed = [outcome.step.name for outcome in outcomes if outcome.status == FAILED]
    print(f"gpu-report: {out / 'report.md'}; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
