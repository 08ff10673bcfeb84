"""The page that shows a selection: read back in a browser, with the mouse where a reader's would be."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

np = pytest.importorskip("numpy")
PIL = pytest.importorskip("PIL.Image")
from chromium import Page, chromium  # noqa: E402

from script_kernels.selection import Selection, View, save_html, square_view  # noqa: E402

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{data}'&"


def example(name: str = EVIL) -> Selection:
    """Six tokens on a grid of two lines; one does not compete and lies in no cell, another has no relevance."""
    return Selection(
        name,
        np.array([1, 4]),
        (View(name, np.array([[0, 1, 2], [3, 4, -1]])),),
        6,
        relevance=np.array([0.125, 0.5, 1.0, 0.0, np.nan, np.nan], np.float32),
        survives=np.array([True, True, False, True, True, True]),
        redundancy=np.array([-0.5, 0.25, 0.75, np.inf, 0.1, np.nan], np.float32),
        order=np.array([-1, 2, 0, 3, 1, -1]),
        gain=np.array([np.nan, 0.0625, 1.0, -np.inf, 0.5, np.nan]),
    )


def photo(height: int = 20, width: int = 33) -> object:
    return PIL.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8))


def read(page: Page) -> dict[str, str]:
    fields = "[...document.querySelectorAll('#readout dd')].map((dd) => [dd.dataset.field, dd.textContent])"
    return dict(page.value(fields)) if not page.value("document.getElementById('readout').hidden") else {}


def fills(page: Page, selection: int) -> list[str]:
    return page.value(
        f"[...document.querySelectorAll('rect[data-selection=\"{selection}\"]')].map((r) => r.getAttribute('fill'))"
    )


def test_a_browser_shows_what_was_found(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.html"
    free = Selection("second", np.array([0]), (square_view("square", 5),), 5)
    save_html(path, [example(), free], [photo(), None], title=EVIL, milliseconds={"gsp": 0.25, "<b>": 1})
    with chromium() as page:
        page.open(path)
        assert page.value("document.title") == EVIL
        assert page.value("document.querySelector('h2').textContent") == f"{EVIL}: 2 of 6 tokens kept"
        assert page.value("document.getElementById('times').textContent") == "gsp 0.25 ms, <b> 1 ms"
        stages = "[...document.querySelectorAll('#stages button')].map((b) => b.dataset.stage)"
        assert page.value(stages) == ["kept", "relevance", "redundancy", "survives", "order", "gain"]
        # The picture was decoded, and the cells cover it.
        assert page.value("document.querySelector('image').href.baseVal.startsWith('data:image/jpeg')")
        page.value("window.held = new Image(); held.src = data.pictures[0]; held.decode()")
        assert page.value("[held.width, held.height]") == [33, 20]
        assert page.value("document.querySelectorAll('rect').length") == 5 + 5

        assert read(page) == {}
        page.point('rect[data-selection="0"][data-token="2"]')
        expected = {"token": "2, row 0, column 2", "relevance": "1", "redundancy": "0.75", "GSP": "drops it"}
        assert read(page) == expected | {"order": "0", "gain": "1", "kept": "no"}
        page.point('rect[data-selection="0"][data-token="3"]')
        expected = {"token": "3, row 1, column 0", "relevance": "0", "redundancy": "none", "GSP": "keeps it"}
        assert read(page) == expected | {"order": "3", "gain": "none", "kept": "no"}
        page.point('rect[data-selection="0"][data-token="4"]')
        assert (read(page)["relevance"], read(page)["kept"]) == ("none", "yes")
        page.point('rect[data-selection="1"][data-token="0"]')  # nothing but what is kept
        assert read(page) == {"token": "0, row 0, column 0", "kept": "yes"}
        page.point("h1")
        assert read(page) == {}

        clear, dark = "rgba(0,0,0,0)", "rgba(16,16,18,.8)"
        assert fills(page, 0) == [dark, clear, dark, dark, clear]
        page.point('button[data-stage="survives"]', click=True)
        assert page.value("document.body.dataset.stage") == "survives"
        assert fills(page, 0) == [clear, clear, dark, clear, clear]
        page.point('button[data-stage="relevance"]', click=True)
        shown = fills(page, 0)
        assert shown[4] == dark  # it has none
        assert shown[2] == "rgba(252,253,191,.78)"  # the brightest
        assert shown[3] == "rgba(10,8,30,.78)"
        assert len(set(shown)) == 5
        assert fills(page, 1) == [clear] * 5  # no such stage
        page.point('button[data-stage="order"]', click=True)
        assert fills(page, 0)[0] == dark
        assert fills(page, 0)[2] == "rgba(252,253,191,.78)"
        pressed = "[...document.querySelectorAll('#stages [aria-pressed=true]')].map((b) => b.dataset.stage)"
        assert page.value(pressed) == ["order"]

        asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith(("file://", "data:")) for url in asked), asked
        assert [e for e in page.events if e["method"] == "Runtime.exceptionThrown"] == []


def test_the_policy_stops_a_request_and_the_readout_stays_in_the_window(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.html"
    save_html(path, [Selection("tall", np.array([0]), (View("tall", np.arange(600).reshape(200, 3)),), 600)])
    with chromium() as page:
        page.open(path)
        for tried, directive in (
            ("fetch('https://example.org/').catch(() => {})", "connect-src"),
            ("new Image().src = 'https://example.org/a.png'", "img-src"),
            ("document.body.append(Object.assign(document.createElement('script'), {src: 'https://example.org/a.js'}))",
             "script-src-elem"),
        ):  # fmt: skip
            refused = page.value(
                "new Promise((done) => {"
                "document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective), {once: true});"
                f"{tried}; setTimeout(() => done('allowed'), 3000); }})"
            )
            assert refused == directive
        page.point('rect[data-token="599"]')
        box = page.value("(({right, bottom, left, top}) => [left, top, innerWidth - right, innerHeight - bottom])"
                         "(document.getElementById('readout').getBoundingClientRect())")  # fmt: skip
        assert min(box) >= 0
        save_html(tmp_path / "empty.html", [], title="\ud800 nothing")  # a prompt of words alone
        page.open(tmp_path / "empty.html")
        assert page.value("document.querySelector('h1').textContent") == "? nothing"
        assert [e for e in page.events if e["method"] == "Runtime.exceptionThrown"] == []


def held(path: pathlib.Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def test_text_cannot_leave_its_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.html"
    save_html(path, [example()], title=EVIL)
    text = path.read_text()
    assert text.count("</script>") == 2
    assert text.count("<img") == 0
    assert held(path)["selections"][0]["name"] == EVIL
    assert not re.search(r"(?:src|href)=[\"']?https?:|url\(|@import|<link", text)


def test_a_picture_behind_many_views_is_held_once_and_frames_share_the_room(tmp_path: pathlib.Path) -> None:
    views = tuple(square_view(f"frame {i}", 4) for i in range(9))
    shown = Selection("video", np.array([0]), views, 4)
    save_html(tmp_path / "one.html", [shown], [photo(1500, 3000)])
    assert len(held(tmp_path / "one.html")["pictures"]) == 1
    assert held(tmp_path / "one.html")["selections"][0]["views"][8]["size"] == [1024, 512]
    save_html(tmp_path / "nine.html", [shown], [[photo(1500, 3000)] * 9])
    assert held(tmp_path / "nine.html")["selections"][0]["views"][8]["size"] == [341, 171]


def test_nothing_is_written_where_the_pictures_do_not_fit(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="images: expected 1, one for each selection, got 2"):
        save_html(path, [example()], [photo(), photo()])
    with pytest.raises(ValueError, match="image: expected one picture, or 1, one for each view, got 2"):
        save_html(path, [example()], [[photo(), photo()]])
    with pytest.raises(ValueError, match=r"image: expected a readable picture, got .*absent\.png"):
        save_html(path, [example()], [tmp_path / "absent.png"])
    assert not path.exists()
