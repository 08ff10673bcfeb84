"""prune on a grid: GSP's sources as the squares of one colour of a checkerboard."""

import numpy
import pytest
import torch
from test_methods_split import swapped

import script_kernels
import script_kernels.numpy
from script_kernels import reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH, HEIGHT = 6, 9
N = WIDTH * HEIGHT


def by_hand(tokens, query, keep, width, aligned=None, **options):
    """The op on tokens whose pairs have changed places, put back."""
    order = swapped(tokens.shape[1], width)
    aligned = None if aligned is None else aligned[:, order]
    kept = script_kernels.prune(tokens[:, order], query, keep, aligned=aligned, **options)
    return order[kept].sort(dim=1).values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"combine": "restrict", "gsp_drop": 0.4},
        {"combine": "union"},
        {"rounds": 3, "gsp_drop": 0.7, "combine": "restrict"},
        {"gsp_drop": 0.0},
        {"negate": True, "floor": 0.3, "power": 2.0, "reduce": "max"},
    ],
    ids=str,
)
def test_is_prune_of_the_swapped_tokens(dtype, options):
    for width, height in ((WIDTH, HEIGHT), (2, 20), (24, 3), (10, 1), (8, 8)):
        n = width * height
        tokens = testing.make_tokens("clustered", 2, n, 20, dtype=dtype, seed=width)
        aligned = testing.make_tokens("gaussian", 2, n, 12, dtype=dtype, seed=width + 1)
        for query, space in (
            (None, None),
            (testing.make_query(1, 3, 20, dtype=dtype), None),
            (testing.make_query(2, 3, 12, dtype=dtype), aligned),
        ):
            keep = max(1, n // 6)
            kept = script_kernels.prune(
                tokens, query, keep, aligned=space, split="checker", grid_width=width, **options
            )
            assert torch.equal(kept, by_hand(tokens, query, keep, width, aligned=space, **options))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset"])
def test_strides(layout):
    tokens = testing.make_tokens("photo", 2, N, 16)
    aligned = {
        "transposed": tokens.mT.contiguous().mT,
        "expanded": tokens[:1].expand(2, -1, -1),
        "offset": torch.cat([tokens, tokens], 1)[:, N:],
    }[layout]
    query = testing.make_query(1, 2, 16)
    kept = script_kernels.prune(aligned, query, 9, split="checker", grid_width=WIDTH)
    assert torch.equal(kept, by_hand(aligned.contiguous(), query, 9, WIDTH))


def test_gsp_drops_squares_of_one_colour(backend):
    """In one round, from what is kept whole otherwise: all of GSP's survivors."""
    tokens = testing.make_tokens("gaussian", 3, N, 16, device=backend.device)
    graph = {"combine": "restrict", "gsp_drop": 1 / 3}
    for split, grid_width, colour in (
        ("raster", None, lambda t: t % 2),
        ("checker", WIDTH, lambda t: (t // WIDTH + t) % 2),
    ):
        kept = backend.prune(tokens, None, N - N // 3, split=split, grid_width=grid_width, **graph)
        for row in kept.tolist():
            gone = set(range(N)) - set(row)
            assert len(gone) == N // 3
            assert {colour(t) for t in gone} == {0}
            assert len({t % WIDTH % 2 for t in gone}) == (1 if split == "raster" else 2)


def test_an_odd_width_is_a_checkerboard_as_it_comes(backend):
    tokens = testing.make_tokens("clustered", 2, 63, 16, device=backend.device)
    kept = backend.prune(tokens, None, 9, split="checker", grid_width=7)
    assert torch.equal(kept, backend.prune(tokens, None, 9))


def test_the_oracle_agrees():
    """On tokens of which rounding decides nothing."""
    agreed = 0
    for seed in range(12):
        tokens = testing.make_tokens("clustered", 1, N, 24, seed=seed)
        query = testing.make_query(1, 2, 24, seed=seed)
        asked = {"split": "checker", "grid_width": WIDTH, "combine": "restrict"}
        kept = script_kernels.prune(tokens, query, 8, **asked)
        agreed += torch.equal(kept, reference.prune(tokens, query, 8, dtype=torch.float64, **asked))
    assert agreed >= 11


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads_or_batch(threads):
    tokens = testing.make_tokens("powerlaw", 2, 600, 64)
    asked = {"split": "checker", "grid_width": 20}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        kept = script_kernels.prune(tokens, None, 60, **asked)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(kept[1:], script_kernels.prune(tokens[1:], None, 60, **asked))
    assert (script_kernels.numpy.prune(tokens.numpy(), None, 60, threads=threads, **asked) == kept.numpy()).all()


BAD = [
    ({"split": "checkers"}, ValueError, "split: expected 'raster' or 'checker', got 'checkers'"),
    (
        {"split": "checker"},
        ValueError,
        "grid_width: expected the tokens of a row of the grid with .*, got None",
    ),
    ({"grid_width": 6}, ValueError, "grid_width: expected it with split='checker' only, got 6 with 'raster'"),
    ({"split": "checker", "grid_width": 7}, ValueError, "grid_width: expected a divisor of N = 54, .* got 7"),
    ({"split": "checker", "grid_width": 0}, ValueError, "grid_width: expected grid_width >= 1, got 0"),
    ({"split": "checker", "grid_width": -6}, ValueError, "grid_width: expected grid_width >= 1, got -6"),
    ({"split": "checker", "grid_width": 6.0}, TypeError, "grid_width: expected an int, got float"),
    ({"split": 1}, TypeError, "split: expected a str, got int"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=str)
def test_errors(given, error, message):
    tokens = testing.make_tokens("gaussian", 1, N, 8)
    with pytest.raises(error, match=message):
        script_kernels.prune(tokens, None, 6, **given)
    with pytest.raises(error, match=message):
        script_kernels.numpy.prune(tokens.numpy(), None, 6, **given)
    if error is ValueError:  # the op's own check, which says the same
        with pytest.raises(RuntimeError, match=message):
            torch.ops.script.prune(tokens, None, 6, **given)


def test_numbers_of_numpy_s_are_numbers():
    tokens = testing.make_tokens("gaussian", 1, N, 8).numpy()
    kept = script_kernels.numpy.prune(tokens, None, 6, split="checker", grid_width=numpy.int32(WIDTH))
    assert (kept == script_kernels.numpy.prune(tokens, None, 6, split="checker", grid_width=WIDTH)).all()


def test_compiles_and_exports():
    def choose(tokens):
        return script_kernels.prune(tokens, None, 6, split="checker", grid_width=WIDTH)

    tokens = testing.make_tokens("gaussian", 2, N, 8)
    assert torch.equal(torch.compile(choose, fullgraph=True, backend="eager")(tokens), choose(tokens))
    torch.library.opcheck(torch.ops.script.prune.default, (tokens, None, 6), {"split": "checker", "grid_width": WIDTH})
