"""The plugin in the real engine against transformers with `prune_inputs` on the same weights: one engine a family."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAMILIES = ("llava", "llava_next", "internvl", "qwen2_5_vl")
RATIO = 0.4
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import engines, tiny

if __name__ == "__main__":
    family, folder = sys.argv[1], Path(sys.argv[2])
    tiny.save(family, folder)
    sizes = [[(100, 60)], [(60, 110)], [(60, 110), (120, 60)], []]
    prompts = [
        (tiny.question(family, len(s), i), [tiny.picture(*size, seed=10 * i + j) for j, size in enumerate(s)])
        for i, s in enumerate(sizes)
    ]
    ratio = float(sys.argv[4])
    engine = engines.start(folder, {"script_keep_ratio": ratio})
    answers = {"first": engines.ask(engine, prompts), "again": engines.ask(engine, prompts)}
    answers["alone"] = [engines.ask(engine, [prompt])[0] for prompt in prompts]
    answers["want"] = engines.reference(folder, family, prompts, keep_ratio=ratio, query=None)
    answers["wrong"] = engines.reference(folder, family, prompts, keep_ratio=ratio, query=None, gsp_drop=0.49)
    answers["whole"] = engines.reference(folder, family, prompts)
    answers["all"] = engines.ask(engine, prompts, script_keep_ratio=1)
    print("ANSWERS", json.dumps(answers))
"""


def distance(a: dict, b: dict) -> float:
    if a["tokens"] != b["tokens"]:
        return float("inf")
    return max(abs(x - y) for x, y in zip(a["scores"], b["scores"], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_transformers(family: str, tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, family, tmp_path / "model", Path(__file__).parent, str(RATIO)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers = json.loads(line.removeprefix("ANSWERS "))
    for i, want in enumerate(answers["want"]):
        for run in ("first", "again", "alone"):
            got = answers[run][i]
            assert got["length"] == want["length"], (run, i)
            assert distance(got, want) < 1e-4, (run, i)
        # All kept, per request: the whole prompt's answer.
        assert answers["all"][i]["length"] == answers["whole"][i]["length"], i
        assert distance(answers["all"][i], answers["whole"][i]) < 1e-4, i
    # Controls: another selection and the whole image are told apart from the right one, wherever there is an image.
    for other in ("wrong", "whole"):
        assert all(distance(answers["first"][i], answers[other][i]) > 1e-2 for i in range(3)), other
