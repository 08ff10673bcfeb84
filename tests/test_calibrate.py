"""The search finds what changes a model least, within its budget, and goes on where it was cut."""

import json
import math

import pytest
import torch

from script_kernels.calibrate import Calibration, Candidate, calibrate, candidates, compare

GRID = [Candidate("cdpruner", {"power": float(p)}) for p in range(1, 9)]
INPUTS = list(range(24))


class Model:
    """Log-probabilities that a candidate of power p shifts by (p - 6)^2, with a noise of its own for each input."""

    def __init__(self):
        self.runs = []

    def __call__(self, n, candidate):
        self.runs.append((n, candidate))
        generator = torch.Generator().manual_seed(n)
        logits = torch.randn(2, 30, generator=generator)
        if candidate is not None:
            away = abs(candidate.options["power"] - 6.0)
            generator.manual_seed(1000 + n)
            logits = logits + (0.1 + 0.2 * away) * torch.randn(2, 30, generator=generator)
        return logits.log_softmax(-1)

    @property
    def pruned(self):
        return sum(c is not None for _, c in self.runs)


def test_the_best_is_found_within_the_budget():
    model = Model()
    found = calibrate(model, INPUTS, keep=64, budget=60, grid=GRID)
    assert found.best.options == {"power": 6.0}
    assert model.pruned <= 60
    assert len(model.runs) == len({(n, c and c.key) for n, c in model.runs})  # nothing twice, unpruned included
    assert [row.inputs for row in found.rows] == sorted((row.inputs for row in found.rows), reverse=True)
    assert found.rows[0].inputs > found.rows[-1].inputs >= 1
    assert found.rows[0].agreement > found.rows[-1].agreement


def test_without_a_budget_everything_is_tried():
    model = Model()
    progress = []
    found = calibrate(model, INPUTS, keep=64, grid=GRID, progress=lambda done, most: progress.append((done, most)))
    assert found.best.options == {"power": 6.0}
    assert progress[-1] == (model.pruned, len(GRID) * len(INPUTS))
    assert model.pruned == len(GRID) * len(INPUTS)


def test_a_search_that_was_cut_goes_on(tmp_path):
    path = tmp_path / "search.json"

    class Cut(Model):
        def __call__(self, n, candidate):
            if len(self.runs) == 30:
                raise KeyboardInterrupt
            return super().__call__(n, candidate)

    cut, again = Cut(), Model()
    with pytest.raises(KeyboardInterrupt):
        calibrate(cut, INPUTS, keep=64, budget=60, grid=GRID, path=path)
    found = calibrate(again, INPUTS, keep=64, budget=60, grid=GRID, path=path)
    whole = Model()
    assert found == calibrate(whole, INPUTS, keep=64, budget=60, grid=GRID)
    assert 0 < again.pruned < whole.pruned
    with pytest.raises(ValueError, match="path: expected a search with keep 32"):
        calibrate(again, INPUTS, keep=32, budget=60, grid=GRID, path=path)
    assert not list(tmp_path.glob("*.part"))


def test_it_is_read_as_it_was_written(tmp_path):
    found = calibrate(Model(), INPUTS[:1], keep=64, grid=GRID)
    assert math.isinf(found.rows[0].half)  # of one input there is no interval
    found.save(tmp_path / "found.json")
    assert Calibration.load(tmp_path / "found.json") == found
    json.loads((tmp_path / "found.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (tmp_path / "other.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 1"):
        Calibration.load(tmp_path / "other.json")
    assert found.table().count("\n") == len(GRID) + 1


def test_the_divergence_is_the_one_of_torch():
    before, after = (torch.randn(3, 9).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")
    assert compare(before, after)[0] == pytest.approx(float(expected), rel=1e-5)
    assert compare(before, before) == (0.0, 1.0)
    certain = torch.tensor([[0.0, -math.inf]])
    assert math.isfinite(compare(certain, torch.tensor([[-math.inf, 0.0]]))[0])


def test_the_grid_is_of_methods_that_take_its_options():
    from script_kernels import methods

    tokens, relevance = torch.randn(1, 40, 8), torch.rand(1, 40)
    assert len({c.key for c in candidates()}) == len(candidates())
    for c in candidates():
        kept = methods.select(tokens, relevance if c.query else None, 5, method=c.method, **c.options)
        assert kept.shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": []}, ValueError, "inputs: expected at least one"),
        ({"grid": []}, ValueError, "grid: expected distinct"),
        ({"grid": GRID[:1] * 2}, ValueError, "grid: expected distinct"),
        ({"budget": 7}, ValueError, "budget: expected budget >= 8"),
        ({"keep": "64"}, TypeError, "keep: expected an int"),
        ({"run": lambda n, c: torch.zeros(3)}, TypeError, "run: expected"),
        ({"run": lambda n, c: torch.full((1, 3), math.nan)}, ValueError, "NaN"),
        ({"run": lambda n, c: torch.zeros(1 if c else 2, 3)}, ValueError, "one shape"),
    ],
)
def test_bad_arguments_name_themselves(options, error, message):
    given = {"run": Model(), "inputs": INPUTS, "keep": 64, "grid": GRID, **options}
    with pytest.raises(error, match=message):
        calibrate(given.pop("run"), given.pop("inputs"), **given)
