"""The Triton greedy MAP: on CPU tensors under Triton's interpreter, or on the GPU where there is one.

Every way through the dispatch runs at small sizes: one program per image or several, rows of L from memory or from the
tokens. Several programs cannot wait for each other under the interpreter; there the same body runs a round per launch.
"""

from types import SimpleNamespace

import pytest
import torch
from test_dpp import assert_greedy, bad_tokens, scattered_copies
from triton_interpreter import DEVICE, quiet

from script_kernels import reference, testing
from script_kernels.options import PruneOptions
from script_kernels.triton import prune
from script_kernels.triton.dpp_map import launch_dpp_map
from script_kernels.triton.kernels import plan
from script_kernels.triton.kernels.greedy import launch_greedy
from script_kernels.triton.kernels.layout import Layout, launch
from script_kernels.triton.kernels.pairs import launch_pairs
from script_kernels.triton.kernels.plan import Stage, plan_greedy
from script_kernels.triton.kernels.rows import launch_rows
from script_kernels.triton.qcsp import launch_qcsp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTES = {
    "single": {"matrix_free": False, "columns": 1024},
    "shared": {"matrix_free": False, "columns": 64},
    "features": {"matrix_free": True, "columns": 2048},
    "features shared": {"matrix_free": True, "columns": 128},
}
routes = pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
pytestmark = quiet


def assert_qcsp(tokens, relevance, k, **route):
    indices, gains = launch_qcsp(tokens.to(DEVICE), relevance.to(DEVICE), k, **route)
    bad = bad_tokens(tokens, relevance)
    assert_greedy(indices, gains, testing.kernel64(tokens, relevance), relevance, bad)
    return indices.cpu(), gains.cpu()


# --- the certificate


@routes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (63, 16), (100, 12)])
def test_qcsp_is_the_exact_greedy(route, dtype, n, k):
    assert_qcsp(testing.make_tokens("powerlaw", 1, n, 72, dtype=dtype), testing.make_relevance(1, n), k, **route)


@pytest.mark.parametrize("route", ["shared", "features"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qcsp_of_577_tokens(route, dtype):
    assert_qcsp(
        testing.make_tokens("photo", 1, 577, 40, dtype=dtype), testing.make_relevance(1, 577), 3, **ROUTES[route]
    )


@pytest.mark.parametrize("columns", [64, 256, 1024])
@pytest.mark.parametrize("kind", ["clustered", "photo"])
def test_dpp_map_is_the_exact_greedy(kind, columns):
    kernel = testing.kernel64(testing.make_tokens(kind, 2, 130, 48), testing.make_relevance(2, 130)).float()
    indices, gains = launch_dpp_map(kernel.to(DEVICE), 12, columns=columns)
    kernel64 = testing.kernel64_of(kernel)
    order = kernel64.diagonal(dim1=1, dim2=2)
    assert_greedy(indices, gains, kernel64, order, torch.zeros(2, 130, dtype=torch.bool))


def test_all_tokens_are_ranked():
    assert_qcsp(
        testing.make_tokens("gaussian", 1, 72, 100), testing.make_relevance(1, 72) + 0.1, 72, **ROUTES["shared"]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
@pytest.mark.parametrize("route", ["single", "features"])
def test_qcsp_on_adversarial_tokens(route, name, dtype):
    """All tokens of 12 dimensions: the rank ends before them."""
    tokens = testing.adversarial_tokens(name, 1, 20, 12, dtype=dtype)
    assert_qcsp(tokens, testing.make_relevance(1, 20), 20, **ROUTES[route])


@pytest.mark.parametrize("name", ["rank3", "bad_rows", "zero_rows", "all_bad"])
@pytest.mark.parametrize("route", ["shared", "features shared"])
def test_adversarial_tokens_shared_by_programs(route, name):
    """The rank ends, zero and bad tokens follow: every change of level passes through the exchange."""
    tokens = testing.adversarial_tokens(name, 1, 140, 12)
    assert_qcsp(tokens, torch.ones(1, 140), 15, **ROUTES[route])


# --- rank, ties, non-finite entries


@routes
def test_past_the_rank_by_relevance_then_index_and_bad_tokens_last(route):
    """Eight telling tokens spread over 150 zero ones, whose relevance is lower still."""
    nan = float("nan")
    rows = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3], [0, 0], [nan, 0], [1, 1], [1, 0]])
    place = torch.tensor([3, 140, 20, 129, 64, 1, 100, 149])
    tokens, relevance = torch.zeros(1, 150, 2), torch.full((1, 150), -2.0)
    tokens[0, place] = rows
    relevance[0, place] = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.5, 0.9, 0.0, -1.0])
    indices, gains = assert_qcsp(tokens, relevance, 9, **route)
    assert indices.tolist() == [[20, 149, 3, 64, 140, 129, 100, 0, 2]]
    assert gains.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0]]


def test_bad_tokens_are_the_last_of_all():
    tokens = testing.make_tokens("gaussian", 1, 80, 4)
    tokens[0, [5, 70], 1] = float("inf")
    relevance = torch.full((1, 80), -1.0)
    relevance[0, 5] = 3.0
    indices, _ = assert_qcsp(tokens, relevance, 80, **ROUTES["single"])
    assert indices[0, -2:].tolist() == [5, 70]


@pytest.mark.parametrize("columns", [64, 1024])
def test_ties_go_to_the_lowest_index(columns):
    indices, gains = launch_dpp_map(torch.eye(100, device=DEVICE)[None], 66, columns=columns)
    assert indices.tolist() == [list(range(66))]
    assert (gains == 1).all()


@pytest.mark.parametrize("columns", [64, 1024])
def test_signed_zeros_tie_past_the_rank(columns):
    relevance = torch.tensor([[-0.0, 0.0] * 40])
    route = {"matrix_free": False, "columns": columns}
    indices, _ = assert_qcsp(testing.make_tokens("gaussian", 1, 80, 8), relevance, 6, **route)
    assert indices.tolist() == [list(range(6))]


@routes
def test_of_equal_tokens_the_first_is_picked(route):
    """Whole numbers: every order of summation gives the same bits, so copies tie exactly."""
    copy_of = scattered_copies(150, 9, seed=3)
    rows = torch.randint(-3, 4, (9, 16), generator=torch.Generator().manual_seed(1)).float()
    relevance = (testing.make_relevance(1, 9) + 0.5)[:, copy_of]
    indices, gains = assert_qcsp(rows[copy_of][None], relevance, 11, **route)
    first = {int((copy_of == c).int().argmax()) for c in copy_of.unique()}
    assert set(indices[0, :9].tolist()) == first
    assert (gains[0, :9] > 0).all()
    assert (gains[0, 9:] == 0).all()


@pytest.mark.parametrize(
    ("value", "columns"), [(float("nan"), 64), (float("nan"), 1024), (float("inf"), 1024), (-float("inf"), 1024)]
)
def test_dpp_map_with_non_finite_entries(value, columns):
    kernel = testing.kernel64(testing.make_tokens("gaussian", 1, 72, 90), testing.make_relevance(1, 72)).float()
    kernel[0, 3, 3] = kernel[0, 70, 70] = value  # bad tokens
    kernel[0, 5, 66] = kernel[0, 66, 5] = value  # count as 0
    kernel64 = testing.kernel64_of(kernel)
    indices, gains = launch_dpp_map(kernel.to(DEVICE), 72, columns=columns)
    bad = torch.zeros(1, 72, dtype=torch.bool)
    bad[0, [3, 70]] = True
    assert_greedy(indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), bad)
    assert indices[0, -2:].tolist() == [3, 70]


def test_dpp_map_clamps_negative_residuals_and_reads_the_row_of_the_pick():
    kernel = torch.diag(torch.tensor([-3.0, 2.0, -1.0, 0.0]))[None]
    indices, gains = launch_dpp_map(kernel.to(DEVICE), 4)
    assert indices.tolist() == [[1, 3, 2, 0]]
    assert gains.tolist() == [[2.0, 0.0, 0.0, 0.0]]
    kernel = torch.tensor([[[4.0, 3.9, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]]])
    assert launch_dpp_map(kernel.to(DEVICE), 3)[0].tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("columns", [64, 1024])
def test_dpp_map_of_a_strided_kernel(columns):
    kernel = testing.kernel64(testing.make_tokens("photo", 3, 140, 64)).float().to(DEVICE)
    wide = torch.full((3, 140, 290), float("nan"), device=DEVICE)
    wide[:, :, 5:285:2] = kernel
    strided = wide.flip(0)[:, :, 5:285:2].transpose(1, 2)
    indices, gains = launch_dpp_map(strided, 8, columns=columns)
    expected = launch_dpp_map(strided.contiguous(), 8, columns=columns)
    assert torch.equal(indices, expected[0])
    assert torch.equal(gains, expected[1])


@pytest.mark.parametrize("matrix_free", [False, True])
def test_empty_batch(matrix_free):
    tokens, relevance = torch.empty(0, 10, 4, device=DEVICE), torch.empty(0, 10, device=DEVICE)
    indices, gains = launch_qcsp(tokens, relevance, 3, matrix_free=matrix_free)
    assert indices.shape == gains.shape == (0, 3)
    assert launch_dpp_map(torch.empty(0, 10, 10, device=DEVICE), 3)[0].shape == (0, 3)


@routes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1030, 5000])
def test_equal_tokens_go_by_relevance(route, dtype, width):
    """Whatever rounding does over that many columns: one pick takes all their variance."""
    n = 150 if width < 5000 else 40
    relevance = testing.make_relevance(1, n) + 0.01
    rows = 0.1 * torch.ones(2, width) + torch.tensor([[0.0], [1.0]]) * torch.randn(
        width, generator=torch.Generator().manual_seed(1)
    )
    for row in rows.to(dtype):
        indices, gains = launch_qcsp(row.expand(1, n, width).to(DEVICE), relevance.to(DEVICE), 12, **route)
        assert indices[0].tolist() == relevance[0].argsort(descending=True, stable=True)[:12].tolist()
        assert (gains[0, 1:] == 0).all()


@routes
@pytest.mark.parametrize("scale", [1.0, 2.0**64, 2.0**-70, 1e38])
def test_relevance_of_any_finite_size(route, scale):
    """No square overflows or vanishes: only NaN and Inf are bad."""
    tokens = torch.eye(6)[None]
    relevance = torch.tensor([[1.0, 2.0, 1.5, 3.0, float("nan"), 0.5]]) * scale
    indices, gains = launch_qcsp(tokens.to(DEVICE), relevance.to(DEVICE), 6, **route)
    assert indices.tolist() == [[3, 1, 2, 0, 5, 4]]
    expected = torch.tensor([[9.0, 4.0, 2.25, 1.0, 0.25, 0.0]]).double() * (scale * scale)
    torch.testing.assert_close(gains.cpu(), expected.float())


@routes
@pytest.mark.parametrize("row", [0.0, float("nan")])
def test_the_relevance_of_a_row_that_counts_for_nothing_does_not_hide_the_others(route, row):
    tokens = testing.make_tokens("gaussian", 1, 40, 16)
    tokens[0, 5] = row
    relevance = testing.make_relevance(1, 40) * 1e-10
    relevance[0, 5] = 1e28
    indices, _ = launch_qcsp(tokens.to(DEVICE), relevance.to(DEVICE), 20, **route)
    testing.certify(testing.kernel64(tokens, relevance), indices.cpu())


def test_one_huge_relevance_is_picked_first():
    indices, _ = launch_qcsp(torch.eye(4, device=DEVICE)[None], torch.tensor([[1, 2, 1e20, 3]], device=DEVICE), 4)
    assert indices.tolist() == [[2, 3, 1, 0]]


# --- the same bits whatever the dispatch


@pytest.mark.parametrize("matrix_free", [False, True])
def test_bits_depend_neither_on_the_batch_nor_on_the_programs(matrix_free):
    """Gains are compared bit for bit: an image alone and in a batch, its columns in one program or several."""
    tokens, relevance = testing.make_tokens("photo", 3, 150, 48), testing.make_relevance(3, 150)
    tokens, relevance = tokens.to(DEVICE), relevance.to(DEVICE)
    batch = launch_qcsp(tokens, relevance, 8, matrix_free=matrix_free, columns=2048 if matrix_free else 1024)
    for columns in (128, 512) if matrix_free else (64, 256):
        alone = launch_qcsp(tokens[1:2], relevance[1:2], 8, matrix_free=matrix_free, columns=columns)
        assert torch.equal(alone[0], batch[0][1:2])
        assert torch.equal(alone[1], batch[1][1:2])


def h100(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda")


def test_dispatch_keeps_waiting_programs_resident(monkeypatch):
    """Programs that wait for each other fit on the device together, and images are cut into whole launches."""
    device = h100(monkeypatch)
    resident = 0
    for batch in (1, 2, 8, 32, 133, 1000):
        for n in (1, 64, 576, 1024, 1025, 2880, 8192, 20000, 300_000):
            for k in {1, min(n, 64), min(n, 640)}:
                for features in (False, True):
                    plan = plan_greedy(device, Layout(batch, n), k, features=features)
                    assert plan.slots * plan.columns >= n
                    assert plan.total == batch * plan.slots
                    assert plan.grid == (plan.slots > 1)
                    if plan.grid and plan.resident:
                        assert plan.images * plan.slots <= 132
                        resident += 1
                    assert plan.resident or plan.slots > 132
    assert resident > 20


def test_dispatch_of_the_sizes_that_matter(monkeypatch):
    device = h100(monkeypatch)
    one = plan_greedy(device, Layout(32, 576), 64)
    assert (one.columns, one.total, one.grid, one.images) == (640, 32, False, 32)
    many = plan_greedy(device, Layout(1, 2880), 320)
    assert (many.columns, many.total, many.grid, many.resident) == (64, 45, True, True)
    assert plan_greedy(device, Layout(1, 8192), 640).total == 128
    packed = plan_greedy(device, Layout(5, 2880, torch.zeros(6, dtype=torch.int32)), 64)
    assert packed.total == 2880 // packed.columns + 5 <= 132


def test_a_launch_that_does_not_fit_says_what_to_do(monkeypatch):
    """As Triton reports it where multiprocessors are held back from the process."""

    class Kernel:
        __name__ = "greedy_kernel"

        def __getitem__(self, grid):
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    tensor = torch.empty(1)
    with pytest.raises(RuntimeError, match=r"dpp_map, qcsp and prune: its 45 programs .*CUDA_MPS_ACTIVE"):
        launch(Kernel(), 45, tensor, launch_cooperative_grid=True)
    with pytest.raises(RuntimeError, match=r"^Triton Error"):
        launch(Kernel(), 45, tensor)


@pytest.mark.parametrize(
    ("images", "n", "keep", "columns", "shared"),
    [
        (1, 576, 64, 640, False),
        (32, 576, 64, 640, False),
        (1, 196, 49, 256, False),
        (128, 729, 64, 1024, False),
        (1, 2880, 320, 64, True),
        (1, 8192, 640, 64, True),
        (4, 2880, 320, 256, True),
    ],
)
def test_dispatch_of_what_prune_launches(monkeypatch, images, n, keep, columns, shared):
    """By the picks that its walk takes before it ends, 4/3 of `keep`, not by the length of the ranking, 2 `keep`."""
    plans = []

    def planned(device, layout, k, **options):
        plans.append(plan_greedy(h100(monkeypatch), layout, k, **options))
        return plans[-1]

    class PlannedError(Exception):
        pass

    def stop(*arguments, **options):
        raise PlannedError

    monkeypatch.setattr(plan, "plan_greedy", planned)
    monkeypatch.setattr(prune, "launch_pairs", stop)
    monkeypatch.setattr(prune, "launch_score", lambda *arguments, **options: (None, None))
    with pytest.raises(PlannedError):
        prune.launch_prune(torch.empty(images, n, 8, device="meta"), None, keep, PruneOptions())
    assert [(p.columns, p.grid, p.resident) for p in plans] == [(columns, shared, True)]


def test_images_beyond_what_a_key_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="expected at most 268435456 per image"):
        plan_greedy(torch.device("cpu"), Layout(1, 2**28 + 1), 64)


def test_no_waiting_where_nothing_is_known_of_the_device():
    plan = plan_greedy(torch.device("cpu"), Layout(2, 5000), 64)
    assert plan.grid
    assert not plan.resident
    assert not plan_greedy(torch.device("cpu"), Layout(2, 2048), 640).grid


# --- tiers, early end, packed segments: what prune asks for


def greedy_arguments(tokens, relevance, k, *, matrix_free, columns, cu_seqlens=None, width=None, above=0, upto=None):
    """The arguments of `launch_greedy` that qcsp would pass."""
    layout = Layout.of(tokens, cu_seqlens)
    plan = plan_greedy(tokens.device, layout, k, features=matrix_free, columns=columns)
    slots = torch.zeros(plan.keys(), dtype=torch.int64, device=tokens.device)
    stage = Stage(plan, slots, matrix_free, above, layout.n if upto is None else upto)
    rows = launch_rows(tokens, layout)
    pairs = None if matrix_free else launch_pairs(tokens, layout, rows, relevance, width=width)
    sources = {} if pairs is None else {"kernel": pairs.kernel, "own": pairs.own}
    return (layout, relevance, k, stage, rows), {"tokens": tokens, **sources}


@routes
@pytest.mark.parametrize("survivors", [100, 6, 0])
def test_tiers_equal_the_oracle(route, survivors):
    """Clear-cut greedy within each tier: L is diagonal, so both the order and the ends of the ranks are known."""
    generator = torch.Generator().manual_seed(survivors)
    n, k = 140, 14
    tokens = torch.eye(n)[None] * (torch.rand(1, n, 1, generator=generator) + 0.5)
    relevance = 10.0 ** (-4 * torch.rand(1, n, generator=generator))
    tier = torch.zeros(1, n, dtype=torch.bool)
    tier[0, torch.randperm(n, generator=generator)[:survivors]] = True
    tokens[0, 7, 0] = tokens[0, 100, 3] = float("nan")
    tier[0, 7] = survivors > 0
    tokens[0, [11, 90]] = tokens[0, 12].clone()  # copies
    relevance[0, [11, 12, 90]] = 0.9
    levels = torch.where(tier, 0, 1).masked_fill(bad_tokens(tokens, relevance), 2)
    expected, expected_gains = reference.greedy(
        testing.kernel64(tokens, relevance), relevance.double().masked_fill(levels == 2, 0.0), levels, k
    )
    positional, arguments = greedy_arguments(tokens.to(DEVICE), relevance.to(DEVICE), k, **route)
    indices, gains = launch_greedy(*positional, **arguments, tier=tier.to(DEVICE))
    assert indices.tolist() == expected.tolist()
    torch.testing.assert_close(gains.cpu().double(), expected_gains, rtol=1e-5, atol=1e-9)


def test_a_tier_that_ends_its_rank_hands_over_to_the_rest():
    """Survivors of rank 2 among gaussian tokens: two picks, the other survivors by relevance, then greedy goes on."""
    tokens, relevance = testing.make_tokens("gaussian", 1, 90, 200), testing.make_relevance(1, 90)
    tier = torch.zeros(1, 90, dtype=torch.bool)
    tier[0, ::15] = True
    tokens[0, ::15] = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) @ tokens[0, [0, 15]]
    kernel64 = testing.kernel64(tokens, relevance)
    for route in ("single", "shared"):
        positional, arguments = greedy_arguments(tokens.to(DEVICE), relevance.to(DEVICE), 12, **ROUTES[route])
        indices, gains = (x.cpu() for x in launch_greedy(*positional, **arguments, tier=tier.to(DEVICE)))
        members = set(range(0, 90, 15))
        assert set(indices[0, :6].tolist()) == members
        assert (gains[0] > 0).tolist() == [True] * 2 + [False] * 4 + [True] * 6
        by_relevance = relevance[0, indices[0, 2:6]]
        assert (by_relevance[:-1] >= by_relevance[1:]).all()
        # The rest is the exact greedy of what the survivors leave: their order does not matter to it
        basis = kernel64[0][:, indices[0, :2]]
        rest = kernel64[0] - basis @ torch.linalg.solve(kernel64[0][indices[0, :2]][:, indices[0, :2]], basis.T)
        rest[tier[0]] = rest[:, tier[0]] = 0.0
        testing.certify(rest[None], indices[:, 6:])


@routes
def test_ranking_ends_once_enough_picks_are_counted(route):
    tokens, relevance = testing.make_tokens("photo", 2, 140, 48).to(DEVICE), testing.make_relevance(2, 140).to(DEVICE)
    counted = torch.rand(2, 140, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.6
    positional, arguments = greedy_arguments(tokens, relevance, 14, **route)
    whole, whole_gains = launch_greedy(*positional, **arguments)
    positional[3].slots.zero_()
    indices, gains = launch_greedy(*positional, **arguments, stop=counted, need=4)
    for b in range(2):
        end = int((counted[b, whole[b]].cumsum(0) == 4).int().argmax()) + 1
        assert 4 <= end < 14
        assert torch.equal(indices[b, :end], whole[b, :end])
        assert torch.equal(gains[b, :end], whole_gains[b, :end])
        assert (indices[b, end:] == -1).all()
        assert (gains[b, end:] == 0).all()


@routes
@pytest.mark.parametrize("mode", ["plain", "stop", "tier"])
def test_packed_segments_equal_images_alone(route, mode):
    lengths, limits, needs = [70, 0, 1, 130, 2, 64], [5, 0, 1, 7, 2, 4], [2, 0, 1, 7, 1, 3]
    total = sum(lengths)
    tokens = testing.make_tokens("clustered", 1, total, 24, dtype=torch.bfloat16)[0]
    tokens[[3, 80], 1] = float("nan")
    tokens, relevance = tokens.to(DEVICE), testing.make_relevance(1, total)[0].to(DEVICE)
    flags = (torch.rand(total, generator=torch.Generator().manual_seed(5)) < 0.5).to(DEVICE)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)

    def on_device(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    positional, arguments = greedy_arguments(tokens, relevance, 7, **route, cu_seqlens=cu_seqlens, width=130)
    options = {"plain": {}, "stop": {"stop": flags, "need": on_device(needs)}, "tier": {"tier": flags}}[mode]
    indices, gains = launch_greedy(*positional, **arguments, **options, limits=on_device(limits))
    for s, (start, n) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
        if n == 0:
            continue
        own = slice(start, start + n)
        one = {"matrix_free": route["matrix_free"], "columns": 2048 if route["matrix_free"] else 1024}
        positional, arguments = greedy_arguments(tokens[None, own], relevance[None, own], limits[s], **one)
        options = {}
        if mode == "stop":
            options = {"stop": flags[None, own], "need": needs[s]}
        elif mode == "tier":
            options = {"tier": flags[None, own]}
        alone, alone_gains = launch_greedy(*positional, **arguments, **options)
        assert torch.equal(indices[s, : limits[s]], alone[0])
        assert torch.equal(gains[s, : limits[s]], alone_gains[0])
        assert (indices[s, limits[s] :] == -1).all()


def test_long_segments_are_left_to_the_matrix_free_launch():
    """Two launches share the work of a packed batch by the length of a segment."""
    lengths = [40, 100, 64, 65]
    total = sum(lengths)
    tokens, relevance = testing.make_tokens("photo", 1, total, 24)[0], testing.make_relevance(1, total)[0]
    tokens, relevance = tokens.to(DEVICE), relevance.to(DEVICE)
    cu_seqlens = torch.tensor([0, 40, 140, 204, 269], dtype=torch.int32, device=DEVICE)
    limits = torch.full((4,), 6, dtype=torch.int32, device=DEVICE)
    out = None
    for matrix_free, columns, span in ((False, 64, {"upto": 64}), (True, 512, {"above": 64})):
        options = {"matrix_free": matrix_free, "columns": columns, "cu_seqlens": cu_seqlens, "width": 64}
        positional, arguments = greedy_arguments(tokens, relevance, 6, **options, **span)
        out = launch_greedy(*positional, **arguments, limits=limits, out=out)
    for s, start in enumerate([0, 40, 140, 204]):
        own = slice(start, start + lengths[s])
        alone = launch_qcsp(tokens[None, own], relevance[None, own], 6, matrix_free=lengths[s] > 64, columns=None)
        assert torch.equal(out[0][s], alone[0][0])
        assert torch.equal(out[1][s], alone[1][0])


def test_statistics_mark_bad_and_zero_rows():
    """What the greedy kernel takes from the row statistics."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [float("nan"), 1.0], [3.0, 4.0]]], device=DEVICE)
    inv_norm = launch_rows(tokens, Layout.of(tokens)).inv_norm
    torch.testing.assert_close(inv_norm.cpu(), torch.tensor([1.0, 0.0, -1.0, 0.2]))
