"""The code in the README and on the pages of the ops runs and says what they do; figures are measured ones."""

import math
import pathlib
import re
from typing import Any

import pytest
import torch

import script_kernels
from bench import figure
from script_kernels import ops, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"
RUN = RESULTS / "amd-epyc-zen5-2026-11-22"
B, N, D, Q, KEEP = 2, 41, 16, 3, 10


def snippet(text: str) -> str:
    """The first Python block of a text."""
    found = re.compile(r"```python\n(.*?)```", re.DOTALL).search(text)
    assert found is not None
    return found.group(1)


def run(text: str, **names: Any) -> dict[str, Any]:
    """Runs that block with torch's functions, math.floor and math.ceil, and the given names in scope."""
    space: dict[str, Any] = {name: getattr(torch, name) for name in ("exp", "inf", "ones", "where", "zeros")}
    space |= {"torch": torch, "normalize": torch.nn.functional.normalize, "floor": math.floor, "ceil": math.ceil}
    space |= names
    exec(snippet(text), space)
    return space


def page(op: str) -> str:
    return (ROOT / "docs" / "ops" / f"{op}.md").read_text()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return testing.make_tokens("powerlaw", B, N, D, seed=5), testing.make_query(1, Q, D, seed=6)


def test_use() -> None:
    space = run(README[README.index("## Use") :])
    assert space["pruned"].shape == (1, 64, 1024)


def test_query_relevance() -> None:
    tokens, query = inputs()
    for negate in (False, True):
        space = run(page("query_relevance"), tokens=tokens, query=query, negate=negate)
        torch.testing.assert_close(
            space["r"], script_kernels.query_relevance(tokens, query, negate=negate), rtol=0, atol=1e-5
        )


def test_bipartite_match() -> None:
    tokens, _ = inputs()
    space = run(page("bipartite_match"), x=tokens, threshold=0.3)
    for name, value in zip(
        ("best", "match", "degree", "mean", "density"), script_kernels.bipartite_match(tokens, 0.3), strict=True
    ):
        torch.testing.assert_close(space[name], value, rtol=0, atol=1e-6, check_dtype=False)


def test_gsp() -> None:
    tokens, _ = inputs()
    _, _, degree, mean, density = script_kernels.bipartite_match(tokens)
    values = {"degree": degree, "mean": mean, "density": density, "gamma": 1.0, "threshold": 0.2, "min_degree": 4}
    space = run(page("gsp"), B=B, N=N, keep=30, **values)
    assert torch.equal(space["mask"], script_kernels.gsp(tokens, 30)[0])


def test_qcsp() -> None:
    tokens, query = inputs()
    relevance = script_kernels.query_relevance(tokens, query)
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    indices, gains = script_kernels.qcsp(tokens, relevance, KEEP)
    r = relevance.double()
    for b in range(B):
        kernel = r[b, :, None] * (unit[b] @ unit[b].T) * r[b]
        space = run(page("qcsp"), L=kernel, N=N, k=KEEP)
        residual = kernel.diagonal() - (space["C"] ** 2).sum(0)
        assert float(residual[indices[b]].abs().max()) < 1e-6  # what it conditioned on is what the op picked
        torch.testing.assert_close(
            (space["C"][torch.arange(KEEP), indices[b]] ** 2).float(), gains[b], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("op", ["max_min", "mmr"])
def test_other_rankings(op: str) -> None:
    tokens, query = inputs()
    relevance = script_kernels.query_relevance(tokens, query)
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    indices, _ = getattr(script_kernels, op)(tokens, relevance, KEEP)
    for b in range(B):
        space = run(page(op), S=unit[b] @ unit[b].T, r=relevance[b].double(), k=KEEP, balance=0.5)
        assert [int(j) for j in space["picks"]] == indices[b].tolist()


def test_prune_and_mask_intersect() -> None:
    tokens, query = inputs()
    stages = {name: getattr(script_kernels, name) for name in ("query_relevance", "gsp", "qcsp", "mask_intersect")}
    space = run(
        page("prune"),
        aligned=tokens,
        tokens=tokens,
        query=query,
        N=N,
        keep=KEEP,
        gsp_drop=0.25,
        oversample=2.0,
        **stages,
    )
    kept = script_kernels.prune(tokens, query, KEEP)
    assert torch.equal(space["kept"], kept)
    for b in range(B):
        ranking, mask = space["ranking"][b].tolist(), space["mask"][b].tolist()
        assert run(page("mask_intersect"), ranking=ranking, mask=mask, k=KEEP)["kept"] == kept[b].tolist()


def test_the_readme_is_short() -> None:
    assert len(README) <= 8000


def test_each_op_has_a_page_with_its_docstring() -> None:
    names = [op.name for op in ops.OPS]
    assert {path.stem for path in (ROOT / "docs" / "ops").glob("*.md")} == {*names, "index"}
    for name in names:
        assert f"::: script_kernels.api.{name}\n" in page(name)
        assert f"]({name}.md)" in page("index")


def test_the_figures_are_those_of_the_committed_runs() -> None:
    first, again = (figure.read(RUN / name) for name in ("baselines-cpu.csv", "baselines-cpu-again.csv"))
    assert figure.readme_rows(first) + "\n\n" in README
    assert figure.whole_table(first, again) + "\n\n" in (RESULTS / "README.md").read_text()


def test_links_lead_to_files() -> None:
    """mkdocs holds those between the pages of docs/; these start in a file that GitHub shows."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", RESULTS / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not link.startswith("https://"):
                assert (path.parent / link).exists(), (path.name, link)
