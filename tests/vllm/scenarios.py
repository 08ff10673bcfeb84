"""What is asked of one engine, in a process of its own: python scenarios.py SCENARIO FAMILY FOLDER; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import engines
import tiny

RATIO = 0.4
CHUNKS = (5, 17)
SIZES = ([(100, 60)], [(60, 110)], [(60, 110), (120, 60)], [])


def prompts_of(family: str) -> list[tuple[str, list[Any]]]:
    """Landscape, portrait, both of them, and words alone."""
    return [
        (tiny.question(family, len(sizes), i), [tiny.picture(*size, seed=10 * i + j) for j, size in enumerate(sizes)])
        for i, sizes in enumerate(SIZES)
    ]


def pair_of(family: str) -> list[tuple[str, list[Any]]]:
    """Two questions on one image, alike up to the last words; the first block of 32 tokens ends within the image."""
    words, image = " ".join(tiny.WORDS[60:82]), tiny.placeholder(family)
    texts = [f"<s> USER: {words} {image} {' '.join(own)} ASSISTANT:" for own in (tiny.WORDS[:5], tiny.WORDS[90:97])]
    return [(text, [tiny.picture(100, 60, seed=3)]) for text in texts]


def pruned(family: str, folder: Path) -> dict[str, Any]:
    """An engine that prunes: answers, and those of transformers with the same tokens pruned."""
    engine = engines.start(folder, {"script_keep_ratio": RATIO})
    watch = engines.Watch(engine)
    prompts, pair = prompts_of(family), pair_of(family)

    def ask(asked: list[Any], **request: Any) -> list[dict[str, Any]]:
        return engines.ask(engine, asked, **request)

    def fresh(asked: list[Any], **request: Any) -> dict[str, Any]:
        engines.forget(engine, encoded=True)
        watch.clear()
        return {"answers": ask(asked, **request), **watch.seen()}

    told: dict[str, Any] = {"first": ask(prompts), "again": ask(prompts)}
    told["alone"] = [ask([prompt])[0] for prompt in prompts]
    told["all"] = fresh(prompts, script_keep_ratio=1)["answers"]
    told["reencoded"] = [fresh(prompts[:1]), fresh(prompts), fresh(prompts)]

    for tokens in CHUNKS:
        engines.chunk(engine, tokens)
        told[f"chunk{tokens}"] = fresh(prompts)
    engines.chunk(engine, 0)

    # The second question finds the first block, which ends within the image, computed before its image was evicted.
    told["straddled"] = [fresh(pair[:1]), {}, fresh(pair[1:])]
    fresh(pair[:1])
    engines.forget(engine, answers=False, encoded=True)
    told["straddled"][1] = {"answers": ask(pair[1:]), **watch.seen()}

    for name, request in (("unasked", {}), ("asked", {"script_query": "text"})):
        turns = [fresh(pair[:1], **request)]
        for question in (pair[1:], pair[:1]):
            cached = ask(question, **request)
            engines.forget(engine)
            turns.append({"cached": cached, "answers": ask(question, **request), **watch.seen()})
        told[name] = {"turns": turns, "together": fresh(pair, **request)}

    budget = {"keep_ratio": RATIO, "query": None}
    told["want"] = engines.reference(folder, family, prompts, **budget)
    told["wrong"] = engines.reference(folder, family, prompts, **budget, gsp_drop=0.49)
    told["whole"] = engines.reference(folder, family, prompts)
    told["want_unasked"] = engines.reference(folder, family, pair, **budget)
    told["want_asked"] = engines.reference(folder, family, pair, keep_ratio=RATIO, query="text", chat=True)
    return told


def stock(family: str, folder: Path) -> dict[str, Any]:
    """An engine for which nothing is configured."""
    engine = engines.start(folder)
    told: dict[str, Any] = {"answers": engines.ask(engine, prompts_of(family))}
    try:
        told["request"] = [
            one["length"] for one in engines.ask(engine, prompts_of(family)[:1], script_keep_ratio=RATIO)
        ]
    except Exception as error:
        told["request"] = str(error)
    return told


def half(family: str, folder: Path) -> dict[str, Any]:
    """bfloat16, and an image wider than what its values hold exactly as numbers."""
    engine = engines.start(
        folder, {"script_keep_ratio": RATIO, "max_pixels": 40000}, dtype="bfloat16", max_model_len=2048
    )
    watch = engines.Watch(engine)
    # Two requests: vLLM does not cut the prefill of one that is alone.
    prompts = [(tiny.question(family, 1, 0), [tiny.picture(2400, 16, seed=5)]), (tiny.question(family, 0, 1), [])]
    told: dict[str, Any] = {"answers": engines.ask(engine, prompts), **watch.seen()}
    engines.forget(engine)
    engines.chunk(engine, 50)
    told["chunked"] = {"answers": engines.ask(engine, prompts), **watch.seen()}
    return told


if __name__ == "__main__":
    scenario, family, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    tiny.save(family, folder, engines.DTYPES[scenario])
    print("TOLD", json.dumps({"pruned": pruned, "stock": stock, "half": half}[scenario](family, folder)))
