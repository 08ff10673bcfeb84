"""Faults planted in PTX that is sound: each must be caught, by name."""

import re

import pytest
import torch

from ptx.launch import PtxBackend, interpreted
from ptx.memory import OutsideError, PtxError, RaceError, StuckError
from ptx.proof_exchange import matrix, small_chunks
from script_kernels import testing
from script_kernels.triton.dpp_map import launch_dpp_map


def replaced(kernel, pattern, by, which=None):
    """An edit of one kernel's PTX: every match of a pattern, or those counted by `which` alone."""
    planted = []

    def edit(name, ptx):
        if name != kernel:
            return ptx
        found = list(re.finditer(pattern, ptx))
        chosen = found if which is None else [found[which]]
        planted.extend(chosen)
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return edit, planted


def exchange(edit, planted, n=130, columns=64, picks=8, **options):
    with interpreted(seed=2, edit=edit, **options):
        try:
            return launch_dpp_map(matrix(n), picks, columns=columns)
        finally:
            assert planted


def test_dropped_release():
    edit, planted = replaced("greedy_kernel", r"atom\.global\.gpu\.release\.exch", "atom.global.gpu.relaxed.exch")
    with pytest.raises(RaceError, match="read and unordered write"):
        exchange(edit, planted)


def test_no_barrier_between_polls_and_rows():
    """A thread has seen the key of one program alone; that the others are there it knows by the barrier.

    128 keys are more than a warp has threads: their maximum goes through shared memory, behind barriers of its own.
    """
    pattern = r"(?s)(ld\.volatile(?:(?!ld\.volatile).)*?)bar\.sync\s+0;"
    edit, planted = replaced("greedy_kernel", pattern, r"\1", which=-1)
    with pytest.raises(RaceError, match=r"p_factor.*ld\.global\.cg"):
        exchange(edit, planted, 300, 256)


MASKED_GROUP = r"@(%p\d+) (ld\.global\.cg\.v4)"


@pytest.mark.parametrize("picks", [8, 16])  # what is left alone, and what is asked for with a whole chunk before it
def test_rows_of_others_without_a_mask(picks, monkeypatch):
    """Of neighbouring rows of C some are there, and one the program whose columns they are is writing just now."""
    small_chunks(monkeypatch)
    which = -1 if picks == 8 else 0
    edit, planted = replaced("greedy_kernel", MASKED_GROUP, r"\2", which=which)
    with pytest.raises(RaceError, match=r"p_factor.*ld\.global\.cg|p_factor.*st\.global"):
        exchange(edit, planted, picks=picks)


def test_one_row_of_others_too_many(monkeypatch):
    small_chunks(monkeypatch)
    planted = []

    def edit(name, ptx):
        for predicate, _ in re.findall(MASKED_GROUP, ptx) if name == "greedy_kernel" else []:
            pattern = rf"(setp\.gt\.s32\s+{predicate}, %r\d+), (\d+);"
            ptx, count = re.subn(pattern, lambda found: f"{found[1]}, {int(found[2]) - 1};", ptx)
            planted.extend([predicate] * count)
        return ptx

    with pytest.raises(RaceError, match=r"p_factor.*ld\.global\.cg|p_factor.*st\.global"):
        exchange(edit, planted)


def test_weak_polls():
    edit, planted = replaced("greedy_kernel", r"ld\.volatile\.global", "ld.global")
    with pytest.raises(RaceError, match="p_slots"):
        exchange(edit, planted)


def test_polls_that_do_not_wait():
    """The loop's exit taken at once: keys that are not there yet are taken for keys, and the picks are wrong."""
    pattern = (
        r"(setp\.(?:ne|eq)\.b(?:32|64) \s*(%p\d+)[^;]*;\s*@)(!?)(\2 bra\s+(\S+);)(?=(?:[^;]*;){1,4}[^;]*ld\.volatile)"
    )
    edit, planted = replaced("greedy_kernel", pattern, r"\1\3\4 bra.uni \5;")

    def certified():
        indices, _ = exchange(edit, planted)
        testing.certify(testing.kernel64_of(matrix(130)), indices)

    with pytest.raises((PtxError, AssertionError)):
        certified()


def test_a_program_that_never_publishes():
    edit, planted = replaced("greedy_kernel", r"@%p\d+ atom\.global\.gpu\.release\.exch[^;]*;", "", which=-1)
    with pytest.raises(StuckError, match="nothing has happened"):
        exchange(edit, planted)


@pytest.mark.parametrize("which", [0, -1])
def test_dropped_barrier(which):
    edit, planted = replaced("row_kernel", r"bar\.sync\s+0;", "", which=which)
    with pytest.raises(RaceError, match="shared"):
        PtxBackend(seed=1, edit=edit).query_relevance(
            testing.make_tokens("photo", 1, 5, 40), testing.make_query(1, 2, 40)
        )
    assert planted


def match_tokens():
    return testing.make_tokens("clustered", 1, 70, 160, dtype=torch.bfloat16)


def test_missing_wait():
    """The pipeline of cp.async reads a stage before its copies have arrived."""
    edit, planted = replaced("match_kernel", r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 7;")
    with pytest.raises(RaceError, match="before the copy has arrived"):
        PtxBackend(seed=1, edit=edit).bipartite_match(match_tokens())
    assert planted


@pytest.mark.slow
def test_a_wait_for_one_group_too_few():
    edit, planted = replaced("match_kernel", r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;")
    with pytest.raises(PtxError):
        PtxBackend(seed=1, edit=edit).bipartite_match(match_tokens())
    assert planted


def test_off_by_one_in_a_mask():
    """row < n + 1 in the place of row < n: the store of the last tile leaves its tensor."""
    edit, planted = replaced("min_max_kernel", r"setp\.lt\.s32", "setp.le.s32")
    tokens, query = testing.make_tokens("photo", 1, 5, 40), testing.make_query(1, 2, 40)
    with pytest.raises(OutsideError, match="of p_"):
        PtxBackend(seed=1, edit=edit).query_relevance(tokens, query)
    assert planted


def test_unknown_opcodes_raise_by_name():
    edit, _ = replaced("min_max_kernel", r"sub\.f32", "frobnicate.f32")
    tokens, query = testing.make_tokens("photo", 1, 5, 40), testing.make_query(1, 2, 40)
    with pytest.raises(NotImplementedError, match=r"frobnicate\.f32"):
        PtxBackend(seed=1, edit=edit).query_relevance(tokens, query)
