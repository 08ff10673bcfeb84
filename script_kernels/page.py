"""The page of `selection.save_html`: one file, whose policy lets it load nothing."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .selection import Array, Selection

_FIELDS = ("relevance", "taken", "redundancy", "survives", "order", "gain")


def build(
    selections: Sequence[Selection], pictures: Sequence[Sequence[Array | None]], title: str, times: Mapping[str, float]
) -> str:
    """The page's text; pictures: one or None for each view of each selection."""
    uris: dict[int, int] = {}  # a picture behind several views is held once
    stored: list[str] = []

    def place(picture: Array | None) -> int | None:
        if picture is None:
            return None
        if id(picture) not in uris:
            uris[id(picture)] = len(stored)
            stored.append(_data_uri(picture))
        return uris[id(picture)]

    def plain(selection: Selection, behind: Sequence[Array | None]) -> dict[str, Any]:
        views = [
            {
                "name": view.name,
                "rows": view.tokens.shape[0],
                "cols": view.tokens.shape[1],
                "tokens": view.tokens.ravel().tolist(),
                "picture": place(picture),
                "size": list(picture.shape[1::-1]) if picture is not None else None,
            }
            for view, picture in zip(selection.views, behind, strict=True)
        ]
        values = {name: _numbers(getattr(selection, name)) for name in _FIELDS}
        stays = selection.stays.tolist()
        return {"name": selection.name, "kept": stays, "count": len(selection.kept), "views": views, **values}

    data = {
        "selections": [plain(s, p) for s, p in zip(selections, pictures, strict=True)],
        "times": {str(name): round(float(ms), 3) for name, ms in times.items()},
        "pictures": stored,
    }
    # Inside a script element only the angle bracket could end it; the others are for whoever pastes the text elsewhere.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    filled = {"title": html.escape(title), "data": text}
    return re.sub(r"\{(title|data)\}", lambda found: filled[found[1]], _PAGE)  # at once: a title may say "{data}"


def _numbers(values: Array | None) -> list[Any] | None:
    """JSON's numbers, to six digits; null for what is none."""
    if values is None:
        return None
    if np.issubdtype(values.dtype, np.floating):
        return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]
    return values.tolist()


def _data_uri(picture: Array) -> str:
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(picture).save(held, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode("ascii")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #1a1c1f; background: #fff; }
  body { margin: 1.5rem; max-width: 76rem; }
  h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
  p, figcaption { color: #62676e; margin: .2rem 0; }
  nav { position: sticky; top: 0; background: #fff; padding: .5rem 0; z-index: 1; }
  nav button { font: inherit; padding: .3rem .8rem; border: 1px solid #b9bec5; background: #fff; cursor: pointer; }
  nav button[aria-pressed=true] { background: #1a1c1f; color: #fff; border-color: #1a1c1f; }
  .views { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; flex: 1 1 18rem; max-width: 44rem; }
  svg { display: block; width: 100%; height: auto; background: #c8c8c8; }
  rect { shape-rendering: crispEdges; cursor: crosshair; }
  svg.narrow { max-width: 18rem; }
  rect.on { stroke: #12b5e5; stroke-width: 3; vector-effect: non-scaling-stroke; }
  #readout { position: fixed; pointer-events: none; background: #1a1c1fee; color: #fff; padding: .5rem .8rem;
    border-radius: .3rem; font-variant-numeric: tabular-nums; z-index: 2; }
  #readout dl { display: grid; grid-template-columns: auto auto; gap: 0 .8rem; margin: 0; } #readout dd { margin: 0; }
</style>
</head>
<body>
<h1>{title}</h1>
<p id="times"></p>
<nav id="stages" aria-label="stages"></nav>
<p id="says"></p>
<main id="selections"></main>
<div id="readout" role="status" hidden><dl></dl></div>
<noscript>This page draws its grids with JavaScript.</noscript>
<script type="application/json" id="data">{data}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const STAGES = [
  ["kept", "Kept", "Bright: the tokens that the language model sees."],
  ["relevance", "Relevance", "How well a token fits the question: dark 0, bright 1."],
  ["taken", "Taken", "Lit: kept by where the question points, and as typical, before the other stages."],
  ["redundancy", "Redundancy", "How alike a token is to others, by GSP: brighter is more redundant."],
  ["survives", "GSP", "Dark: dropped by GSP as redundant."],
  ["order", "QCSP order", "Brighter: ranked earlier. Dark: not ranked."],
  ["gain", "QCSP gain", "What a token added when QCSP took it: brighter is more. Dark: not ranked."],
].filter(([key]) => data.selections.some((one) => one[key]));
const NS = "http://www.w3.org/2000/svg";
const make = (tag, parent, text) => {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  return made;
};
const draw = (tag, parent, attributes) => {
  const made = parent.appendChild(document.createElementNS(NS, tag));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};
const cells = [];
data.selections.forEach((one, s) => {
  const section = make("section", document.getElementById("selections"));
  make("h2", section, `${one.name}: ${one.count} of ${one.kept.length} tokens kept`);
  const views = make("div", section);
  views.className = "views";
  one.views.forEach((view) => {
    const figure = make("figure", views);
    const [width, height] = view.size || [20 * view.cols, 20 * view.rows];
    const svg = draw("svg", figure, { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": view.name });
    if (view.picture === null) svg.setAttribute("class", "narrow");
    else draw("image", svg, { href: data.pictures[view.picture], width, height, preserveAspectRatio: "none" });
    view.tokens.forEach((token, at) => {
      if (token < 0) return;
      const [row, col] = [Math.floor(at / view.cols), at % view.cols];
      const rect = draw("rect", svg, {
        x: (col * width) / view.cols, y: (row * height) / view.rows,
        width: width / view.cols, height: height / view.rows,
        "data-selection": s, "data-token": token, "data-row": row, "data-col": col,
      });
      cells.push([rect, one, token]);
    });
    make("figcaption", figure, `${view.name}, ${view.rows} x ${view.cols}`);
  });
});
const LIMITS = new Map();  // of each selection and stage: smallest and largest value
const limits = (one, key) => {
  const at = `${data.selections.indexOf(one)} ${key}`;
  if (!LIMITS.has(at)) {
    let [low, high] = key === "relevance" ? [0, 1] : [Infinity, -Infinity];
    if (key !== "relevance") for (const value of one[key]) {
      if (value === null || (key === "order" && value < 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    LIMITS.set(at, [low, high]);
  }
  return LIMITS.get(at);
};
const MAGMA = [[10, 8, 30], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
const heat = (share) => {
  const at = Math.max(0, Math.min(1, share)) * (MAGMA.length - 1);
  const i = Math.min(MAGMA.length - 2, Math.floor(at));
  const mixed = MAGMA[i].map((from, c) => Math.round(from + (at - i) * (MAGMA[i + 1][c] - from)));
  return `rgba(${mixed.join(",")},.78)`;
};
const DARK = "rgba(16,16,18,.8)", CLEAR = "rgba(0,0,0,0)";
const colour = (one, token, key) => {
  if (!one[key]) return CLEAR;
  const value = one[key][token];
  if (typeof value === "boolean") return value ? CLEAR : DARK;
  if (value === null || (key === "order" && value < 0)) return DARK;
  const [low, high] = limits(one, key);
  const share = high > low ? (value - low) / (high - low) : 1;
  return heat(key === "order" && high > low ? 1 - share : share);
};
const show = (key) => {
  document.body.dataset.stage = key;
  document.getElementById("says").textContent = STAGES.find(([name]) => name === key)[2];
  for (const button of document.querySelectorAll("#stages button"))
    button.setAttribute("aria-pressed", button.dataset.stage === key);
  for (const [rect, one, token] of cells) rect.setAttribute("fill", colour(one, token, key));
};
for (const [key, label] of STAGES) {
  const button = make("button", document.getElementById("stages"), label);
  button.type = "button";
  button.dataset.stage = key;
  button.addEventListener("click", () => show(key));
}
const times = Object.entries(data.times).map(([name, ms]) => `${name} ${ms} ms`);
document.getElementById("times").textContent = times.join(", ");
const number = (value) => (value === null ? "none" : String(value));
const readout = document.getElementById("readout");
const about = (one, token, cell) => {
  const told = [["token", `${token}, row ${cell.row}, column ${cell.col}`]];
  if (one.relevance) told.push(["relevance", number(one.relevance[token])]);
  if (one.taken) told.push(["focus", one.taken[token] ? "takes it" : "leaves it"]);
  if (one.redundancy) told.push(["redundancy", number(one.redundancy[token])]);
  if (one.survives) told.push(["GSP", one.survives[token] ? "keeps it" : "drops it"]);
  if (one.order) told.push(["order", one.order[token] < 0 ? "not ranked" : String(one.order[token])]);
  if (one.gain) told.push(["gain", number(one.gain[token])]);
  told.push(["kept", one.kept[token] ? "yes" : "no"]);
  return told;
};
let pointed = null;
const point = (event) => {
  const rect = event.target instanceof SVGRectElement ? event.target : null;
  if (pointed && pointed !== rect) pointed.classList.remove("on");
  pointed = rect;
  readout.hidden = rect === null;
  if (rect === null) return;
  rect.classList.add("on");
  const list = readout.firstElementChild;
  list.replaceChildren();
  const one = data.selections[rect.dataset.selection];
  for (const [name, value] of about(one, Number(rect.dataset.token), rect.dataset)) {
    make("dt", list, name);
    make("dd", list, value).dataset.field = name;
  }
  const near = (at, size, end) => `${Math.max(0, at + size + 18 > end ? at - size - 18 : at + 18)}px`;
  readout.style.left = near(event.clientX, readout.offsetWidth, innerWidth);
  readout.style.top = near(event.clientY, readout.offsetHeight, innerHeight);
};
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);  // a finger
if (STAGES.length) show("kept");
</script>
</body>
</html>
"""
