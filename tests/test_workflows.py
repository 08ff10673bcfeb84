"""What no schema tells of the workflow files: what they run is of this repository, and what they use stays the same.

Keys and types are checked by check-jsonschema (.pre-commit-config.yaml). Whether an action, an image or a runner label
exists, and whether an expression in ${{ }} evaluates, only a run on GitHub shows.
"""

import pathlib
import re
import shutil
import subprocess

import pytest

yaml = pytest.importorskip("yaml", reason="the workflow files are read with PyYAML")

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_end_may_only_read_and_pin_what_they_use(path: pathlib.Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in path.read_text()
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 60, name
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_of_this_repository(path: pathlib.Path) -> None:
    """Shell syntax, make's targets and test files that the steps and their environment name."""
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        step.get("run", "") for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]
    ]
    for command in commands:
        # An expression in a command would be pasted into the shell unquoted: values come by the environment.
        assert "${{" not in command, command
        subprocess.run([shutil.which("bash") or "sh", "-n", "-c", command], check=True)
    targets = [target for command in commands for target in re.findall(r"(?:^|&& )make ([a-z-]+)", command)]
    assert targets or any("cibuildwheel" in command for command in commands)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert all((ROOT / test).is_file() for test in re.findall(r"tests/\w+\.py", path.read_text()))


def test_the_gpu_report_is_kept_even_if_a_part_failed() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text())["jobs"].values()
    (upload,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert (upload["with"]["path"], upload["if"]) == (job["env"]["OUT"], "${{ always() }}")
