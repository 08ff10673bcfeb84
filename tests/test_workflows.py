"""The workflow files against the published JSON schema of GitHub workflows, and what they run against this repository.

The schema (as check-jsonschema ships it) knows keys, types and enumerations. It does not know whether an action's
version, a container image or a runner label exists, nor whether an expression in ${{ }} evaluates: only a run on GitHub
shows that.
"""

import copy
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="the workflow files are read with PyYAML")
jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked with jsonschema")

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


class Loader(yaml.SafeLoader):
    """YAML as GitHub reads it: only true and false are booleans, so that the key `on` stays a word."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))


def load(path: pathlib.Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), Loader)


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


@pytest.fixture(scope="module")
def schema_errors() -> Callable[[dict[str, Any]], list[str]]:
    spec = importlib.util.find_spec("check_jsonschema")
    if spec is None or spec.origin is None:
        pytest.skip("the schema comes with check-jsonschema, which is not installed")
    path = pathlib.Path(spec.origin).parent / "builtin_schemas" / "vendor" / "github-workflows.json"
    validator = jsonschema.Draft7Validator(json.loads(path.read_text()))
    return lambda workflow: [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(workflow)]


def test_both_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["cpu.yml", "gpu.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_follow_the_schema(path: pathlib.Path, schema_errors: Callable[[dict[str, Any]], list[str]]) -> None:
    assert schema_errors(load(path)) == []


def misspelt_runner(workflow: dict[str, Any]) -> None:
    job = next(iter(workflow["jobs"].values()))
    job["runs_on"] = job.pop("runs-on")


def unknown_trigger(workflow: dict[str, Any]) -> None:
    workflow["on"]["pushed"] = {}


def timeout_in_words(workflow: dict[str, Any]) -> None:
    next(iter(workflow["jobs"].values()))["timeout-minutes"] = "forty"


def step_without_action(workflow: dict[str, Any]) -> None:
    next(iter(workflow["jobs"].values()))["steps"].append({"name": "nothing"})


def unknown_permission(workflow: dict[str, Any]) -> None:
    workflow["permissions"]["contents"] = "all"


@pytest.mark.parametrize(
    "damage", [misspelt_runner, unknown_trigger, timeout_in_words, step_without_action, unknown_permission]
)
def test_the_schema_sees_a_mistake(
    damage: Callable[[dict[str, Any]], None], schema_errors: Callable[[dict[str, Any]], list[str]]
) -> None:
    for path in WORKFLOWS:
        workflow = copy.deepcopy(load(path))
        damage(workflow)
        assert schema_errors(workflow) != [], path.name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_end_and_may_only_read(path: pathlib.Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow["on"]
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 60, name
    for step in steps(workflow):
        assert "uses" not in step or re.search(r"@(v\d+|[0-9a-f]{40})$", step["uses"]), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_of_this_repository(path: pathlib.Path) -> None:
    """Shell syntax, make's targets, Python modules and test files that the steps and their environment name."""
    workflow = load(path)
    makefile = (ROOT / "Makefile").read_text()
    named = 0
    for step in steps(workflow):
        command = step.get("run", "")
        # An expression in a command would be pasted into the shell unquoted: values come by the environment.
        assert "${{" not in command, command
        subprocess.run([shutil.which("bash") or "sh", "-n", "-c", command], check=True)
        for target in re.findall(r"(?:^|&& )make ([a-z-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
            named += 1
        for module in re.findall(r"-m (bench[.\w]*)", command):
            assert importlib.util.find_spec(module) is not None, module
            named += 1
    for test in re.findall(r"tests/\w+\.py", path.read_text()):
        assert (ROOT / test).is_file(), test
    assert named >= 1


def test_the_gpu_job_keeps_its_report_and_compares() -> None:
    workflow = load(ROOT / ".github" / "workflows" / "gpu.yml")
    (job,) = workflow["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    assert job["container"]["image"]
    commands = [step.get("run", step.get("uses", "")) for step in job["steps"]]
    report = next(i for i, text in enumerate(commands) if "make gpu-report" in text)
    upload = next(i for i, text in enumerate(commands) if "upload-artifact" in text)
    compare = next(i for i, text in enumerate(commands) if "bench.compare" in text)
    assert report < upload
    assert report < compare
    assert job["steps"][upload]["with"]["path"] == job["env"]["OUT"]
    # A report with a failed part is the one that somebody wants to read.
    assert job["steps"][upload]["if"] == "${{ always() }}"
