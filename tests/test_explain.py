"""`explain` and its figure: what is shown is what `prune_inputs` keeps, and what the ops found on the way."""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
import types

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("transformers")
PIL = pytest.importorskip("PIL.Image")
from tiny_vlm import SIZES, Image, Video, make_inputs  # noqa: E402

import script_kernels  # noqa: E402
from script_kernels.selection import Selection, View, load_picture, plot_selection, save_html, square_view  # noqa: E402
from script_kernels.transformers import explain, prune_inputs  # noqa: E402

PROMPTS = {
    "llava": [[4, Image(), 6], [3, Image(), 2, Image(), 5]],
    "llava_next": [[4, SIZES["llava_next"][0], 6], [4, SIZES["llava_next"][1], 6]],
    "llava_onevision": [[4, SIZES["llava_onevision"][0], 6], [3, Video(), 2]],
    "internvl": [[4, Image(1, 3), 3]],
    "qwen2_5_vl": [[4, Image(8, 12), 3, Video(), 4]],
    "qwen3_vl": [[4, Image(12, 4), 3, Video(), 4]],
}
OPTIONS = (
    {},
    {"query": None},
    {"combine": "restrict"},
    {"negate": True, "per": "tile"},
    {"per": "request", "keep_ratio": 0.3},
    {"combine": "union", "power": 2.0},
    {"reduce": "max", "newlines": "drop"},
    {"method": "divprune"},
    {"method": "relevance"},
)


@pytest.mark.parametrize("family", PROMPTS)
def test_it_tells_of_what_prune_inputs_keeps(family: str) -> None:
    model, inputs = make_inputs(family, PROMPTS[family])
    for options in OPTIONS:
        keep = None if "keep_ratio" in options else 5
        found = explain(model, inputs, keep, **options)
        pruned = prune_inputs(model, inputs, keep, **options)
        assert len(found.images) == len(pruned.keep_indices)
        for shown, kept, scores in zip(found.images, pruned.keep_indices, pruned.scores, strict=True):
            assert shown.kept.tolist() == kept.tolist() == shown.stays.nonzero()[0].tolist()
            if options.get("query", "text") is None:
                assert shown.relevance is None
            else:
                np.testing.assert_array_equal(shown.relevance, scores.numpy())
            # Frames that have fewer tokens than their budget stay whole, and no stage runs.
            if "method" in options or len(kept) == len(scores):
                assert shown.survives is shown.redundancy is shown.order is shown.gain is None
            else:
                assert shown.survives.dtype == bool
                assert {name: len(getattr(shown, name)) for name in ("redundancy", "order", "gain")} == dict.fromkeys(
                    ("redundancy", "order", "gain"), len(scores)
                )
            # Each token that competes lies in one cell.
            cells = sorted(itertools.chain.from_iterable(v.tokens[v.tokens >= 0].tolist() for v in shown.views))
            assert cells == (~scores.isnan()).nonzero()[:, 0].tolist()
        stages = {"relevance"} if options.get("query", "text") else set()
        stages |= set() if "method" in options else {"gsp", "qcsp", "join"}
        assert set(found.milliseconds) == {"encode", "select"} | stages
        assert all(ms >= 0 for ms in found.milliseconds.values())
        assert torch.equal(found.pruned["input_ids"], pruned["input_ids"])


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("text", {"reduce": "mean"}),
        ("text", {"negate": True}),
        ("text", {"negate": True, "reduce": "mean"}),
        (None, {}),
    ],
)
def test_the_stages_are_those_of_the_ops_and_lead_to_what_is_kept(query: str | None, options: dict) -> None:
    model, inputs = make_inputs("llava", PROMPTS["llava"])
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    found = explain(model, inputs, 6, query=query, gsp_drop=0.4, oversample=2.5, floor=0.3, **options)
    for shown, tokens in zip(found.images, features, strict=True):
        relevance = torch.ones(1, 36) if query is None else 0.3 + 0.7 * torch.from_numpy(shown.relevance)[None]
        mask, redundancy = script_kernels.gsp(tokens[None], 36 - 14)
        order, gains = script_kernels.qcsp(tokens[None], relevance, 15)
        assert shown.survives.tolist() == mask[0].tolist()
        np.testing.assert_array_equal(shown.redundancy, redundancy[0].numpy())
        assert np.argsort(np.where(shown.order < 0, 99, shown.order))[:15].tolist() == order[0].tolist()
        assert (shown.order >= 0).sum() == 15
        np.testing.assert_array_equal(shown.gain[order[0].numpy()], gains[0].numpy())
        assert np.isnan(shown.gain[shown.order < 0]).all()
        assert script_kernels.mask_intersect(order, mask, 6)[0].tolist() == shown.kept.tolist()


def test_what_focus_takes_is_told_apart_from_what_the_stages_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    focus = sys.modules["script_kernels.methods.focus"]
    monkeypatch.setattr(focus, "CLEAR", 2.0)  # a random model's relevance points nowhere
    monkeypatch.setattr(focus, "VAGUE", 3.0)
    for family in ("llava", "llava_next"):
        model, inputs = make_inputs(family, PROMPTS[family])
        found = explain(model, inputs, 12)
        pruned = prune_inputs(model, inputs, 12)
        for shown, kept in zip(found.images, pruned.keep_indices, strict=True):
            assert shown.kept.tolist() == kept.tolist()
            taken, ranked = shown.taken.nonzero()[0], np.argsort(np.where(shown.order < 0, 999, shown.order))
            assert 0 < len(taken) < 12
            assert (shown.order[taken] == -1).all()
            assert np.isnan(shown.gain[taken]).all()
            assert sorted([*taken, *ranked[: 12 - len(taken)]]) == kept.tolist()
        figure = plot_selection(found.images[0])
        assert any(axis.get_title().startswith("taken") for axis in figure.axes)
    assert explain(*make_inputs("llava", PROMPTS["llava"]), 6, method="script").images[0].taken is None


def test_where_everything_stays_no_stage_ran() -> None:
    model, inputs = make_inputs("llava", PROMPTS["llava"])
    found = explain(model, inputs, 36, combine="restrict", gsp_drop=0.9, rounds=9)
    assert all(s.survives is None and s.relevance is not None and len(s.kept) == 36 for s in found.images)
    assert "gsp" not in found.milliseconds
    text = {name: inputs[name][:, :2] for name in ("input_ids", "attention_mask")}
    assert explain(model, text, 5).images == []


@pytest.mark.parametrize(
    ("family", "views"),
    [
        ("llava", [("picture", (6, 6), "middle")]),
        ("llava_next", [("the whole picture", (4, 4), "whole"), ("its tiles", (8, 8), "whole")]),
        ("internvl", [("tile 1", (4, 4), None), ("tile 2", (4, 4), None), ("the whole picture", (4, 4), "whole")]),
        ("qwen2_5_vl", [("picture", (4, 6), "whole")]),
        ("qwen3_vl", [("picture", (6, 2), "whole")]),
    ],
)
def test_tokens_lie_where_the_model_has_them(family: str, views: list) -> None:
    model, inputs = make_inputs(family, PROMPTS[family])
    shown = explain(model, inputs, 5).images[0]
    assert [(v.name, v.tokens.shape, v.part) for v in shown.views] == views


def test_videos_have_a_view_for_each_frame() -> None:
    model, inputs = make_inputs("qwen3_vl", PROMPTS["qwen3_vl"])
    video = explain(model, inputs, 5).images[1]
    assert [(v.name, v.tokens.tolist()) for v in video.views] == [
        (f"frame {i + 1}", [[6 * i, 6 * i + 1, 6 * i + 2], [6 * i + 3, 6 * i + 4, 6 * i + 5]]) for i in range(3)
    ]
    assert video.name == "video"


def test_a_grid_is_claimed_only_where_sizes_tell_it() -> None:
    """A resampler's rows lie nowhere, though a square would hold them."""
    model, inputs = make_inputs("llava", [[4, Image(), 6]])
    model.config.perceiver_config = {}
    try:
        (view,) = explain(model, inputs, 5).images[0].views
    finally:
        del model.config.perceiver_config
    assert (view.name, view.part) == ("picture, in the order of its tokens", None)
    odd = square_view("odd", 7)
    assert odd.tokens.tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert np.isnan(odd.lay(np.arange(7.0))[2]).tolist() == [False, True, True]


def test_what_a_fixed_size_encoder_sees_of_the_picture() -> None:
    from script_kernels.transformers.grids import _part

    model, _ = make_inputs("llava", [[4, Image(), 6]])

    def processor(**fields: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(image_processor=types.SimpleNamespace(**fields))

    assert _part(model, None) == _part(model, processor(do_center_crop=True)) == "middle"
    assert _part(model, processor(do_center_crop=False)) == "whole"
    assert _part(model, processor(do_center_crop=True, do_pad=True)) is None
    assert _part(make_inputs("internvl", [[4, Image(1, 1), 6]])[0], None) == "whole"


@pytest.mark.parametrize(
    ("kind", "views"),
    [
        ("aria", [("picture, in the order of its tokens", (3, 3), None)]),  # a resampler
        ("deepseek_vl", [("picture", (4, 4), None)]),  # with a border
        ("gemma3", [("picture", (4, 4), "whole")]),
        ("glm4v", [("picture", (4, 6), "whole")]),
        ("lfm2_vl", [("picture", (2, 2), "whole")]),
        ("minicpm_ocr", [("picture, in the order of its tokens", (4, 4), None)]),  # a size of another kind
        ("mistral3", [("picture", (2, 2), "whole")]),
    ],
)
def test_tokens_of_other_types_lie_where_sizes_tell(kind: str, views: list) -> None:
    vlm_types, vlm_zoo = pytest.importorskip("vlm_types"), pytest.importorskip("vlm_zoo")
    if vlm_types.SINCE.get(kind, (0, 0)) > vlm_types.VERSION:
        pytest.skip("not in this version")
    model = vlm_zoo.make_model(kind)
    found = explain(model, vlm_zoo.make_inputs(model, kind, 2), 3)
    assert [image.name for image in found.images] == ["prompt 1, image", "prompt 2, image"]
    assert [(v.name, v.tokens.shape, v.part) for v in found.images[1].views] == views


def shown(**fields: object) -> Selection:
    return Selection(
        "a $x picture", np.array([0, 5]), (square_view("grid", 6), square_view("again", 6, None)), 6, **fields
    )


def test_the_figure_has_a_panel_for_each_stage_that_ran(tmp_path: pathlib.Path) -> None:
    picture = np.full((60, 90, 3), 250, np.uint8)
    bare = plot_selection(shown(), picture)
    assert [a.get_title() for a in bare.axes] == ["kept\ngrid", "kept\nagain"]
    # Bright where a token stays: cells of 30 x 30 pixels.
    lit = np.asarray(bare.axes[0].images[0].get_array())
    assert (lit == 250).all(2)[::30, ::30].tolist() == [[True, False, False], [False, False, True]]
    relevance = np.array([0, 0.2, np.nan, 0.6, 0.8, 1])
    order = np.array([-1, 0, 1, 2, -1, 3])
    full = plot_selection(shown(relevance=relevance, survives=order >= 0, order=order), picture, most_views=1)
    assert [a.get_title().split("\n")[0] for a in full.axes] == ["kept", "relevance", "left by GSP", "QCSP's order"]
    heat = full.axes[1].images[1].get_array()
    np.testing.assert_array_equal(heat.filled(np.nan).ravel(), relevance)
    assert full.axes[3].images[1].get_array().mask.ravel().tolist() == [True, False, False, False, True, False]
    full.savefig(tmp_path / "full.png")
    assert "the first 1 of 2 views" in full.get_suptitle()
    assert "pyplot" not in {type(full.canvas).__module__.rsplit(".", 1)[-1]}


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA", "CMYK", "I;16"])
def test_pictures_of_any_mode(mode: str, tmp_path: pathlib.Path) -> None:
    ramp = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
    image = PIL.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else PIL.fromarray(ramp).convert(mode)
    picture = load_picture(image)
    assert picture.shape == (6, 8, 3)
    assert picture.dtype == np.uint8
    assert picture[0, 0].max() < picture[-1, -1].min()
    save_html(tmp_path / "page.html", [shown()], [image])


def test_pictures_that_cannot_be_drawn_are_refused() -> None:
    for bad, word in (
        (np.zeros((3, 4, 5), np.uint8), r"shape \(H, W\).*got \(3, 4, 5\)"),
        (np.zeros((3, 4), np.int64), "expected uint8 or floats"),
        (np.zeros((0, 4, 3), np.uint8), "image: expected"),
        (pathlib.Path("absent.png"), "image: expected a readable picture, got absent.png"),
        (object(), "image: expected"),
    ):
        with pytest.raises(ValueError, match=word):
            load_picture(bad)
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (load_picture(clear) == 255).all()  # white where transparent
    assert load_picture(np.array([[0.0, 0.5], [1.0, np.nan]]))[..., 0].tolist() == [[0, 128], [255, 0]]
    huge = plot_selection(shown(), PIL.new("RGB", (6000, 3000)))
    assert np.asarray(huge.axes[0].images[0].get_array()).shape == (512, 1024, 3)


def test_a_selection_that_does_not_fit_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"relevance: expected shape \(6,\), got \(5,\)"):
        shown(relevance=np.zeros(5))
    with pytest.raises(ValueError, match="views: expected cells that hold -1 to 1"):
        Selection("x", np.array([0]), (View("x", np.array([[0, 2]])),), 2)


def test_tokens_that_are_no_numbers_are_shown_as_such(tmp_path: pathlib.Path) -> None:
    """A NaN among the features: relevance 0, ranked last; the page and the figure say so and go on."""
    model, inputs = make_inputs("llava", [[4, Image(), 6]])
    encoder = model.model.get_image_features

    @functools.wraps(encoder)
    def broken(*args, **kwargs):
        out = encoder(*args, **kwargs)
        out.pooler_output = [out.pooler_output[0].clone()]
        out.pooler_output[0][7] = float("nan")
        return out

    model.model.get_image_features = broken
    try:
        found = explain(model, inputs, 5)
    finally:
        del model.model.get_image_features
    (one,) = found.images
    assert not one.stays[7]
    assert one.relevance[7] == 0
    save_html(tmp_path / "page.html", found.images)
    plot_selection(one).savefig(tmp_path / "figure.png")


def test_the_documented_lines_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (pathlib.Path(__file__).parents[1] / "docs" / "transformers.md").read_text()
    lines = page.split("## See what it does\n```python\n")[1].split("```")[0].replace("keep=160", "keep=5")
    model, inputs = make_inputs("llava", [[4, Image(), 6]])
    monkeypatch.chdir(tmp_path)
    exec(lines, {"model": model, "inputs": inputs, "processor": None, "photo": PIL.new("RGB", (30, 20))})
    assert {path.name for path in tmp_path.iterdir()} == {"kept.html", "kept.png"}
