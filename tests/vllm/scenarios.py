"""What is asked of one engine, in a process of its own: python scenarios.py SCENARIO FAMILY FOLDER; prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import engines
import tiny
import torch

RATIO = 0.4
CHUNKS = (5, 17)
# Methods, options, and what asks for them, one of each kind: by relevance with knobs, by diversity, the op with a knob.
METHODS: dict[str, dict[str, Any]] = {
    "cdpruner": {"method": "cdpruner", "query": "text", "reduce": "max", "power": 2.0, "floor": 0.1},
    "negated": {"method": "cdpruner", "query": "text", "negate": True},
    "mixed": {"method": "script", "query": "text", "mix": 0.9, "negate": True},
    "divprune": {"method": "divprune", "query": None},
}
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

    # By "script": the tiny models' relevance points nowhere, and what "focus" then leaves to the question is little.
    for name, request in (("unasked", {}), ("asked", {"script_query": "text", "script_method": "script"})):
        turns = [fresh(pair[:1], **request)]
        for question in (pair[1:], pair[:1]):
            cached = ask(question, **request)
            engines.forget(engine)
            turns.append({"cached": cached, "answers": ask(question, **request), **watch.seen()})
        told[name] = {"turns": turns, "together": fresh(pair, **request)}

    # One question that two requests ask by each method, and all of them in one encoder step.
    told["methods"] = {}
    for name, own in METHODS.items():
        request = {f"script_{option}": value for option, value in own.items()}
        told["methods"][name] = {
            **fresh(pair, **request),
            "want": engines.reference(folder, family, pair, keep_ratio=RATIO, chat=True, **own),
        }

    told["focus"] = fresh(prompts, script_query="text")
    told["want_focus"] = engines.reference(folder, family, prompts, keep_ratio=RATIO, query="text", chat=True)

    budget = {"keep_ratio": RATIO, "query": None}
    told["want"] = engines.reference(folder, family, prompts, **budget)
    told["wrong"] = engines.reference(folder, family, prompts, **budget, gsp_drop=0.49)
    told["whole"] = engines.reference(folder, family, prompts)
    told["want_unasked"] = engines.reference(folder, family, pair, **budget)
    told["want_asked"] = engines.reference(
        folder, family, pair, keep_ratio=RATIO, query="text", method="script", chat=True
    )
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


def planted(family: str, folder: Path) -> dict[str, Any]:
    """What `stock` asks, of an engine whose classes are not the stock ones' code: features that are off by 2^-10."""
    from script_kernels.vllm import models

    kind = getattr(models, {"llava": "PrunedLlava"}[family])
    embed = kind.embed_multimodal
    kind.embed_multimodal = lambda self, **kwargs: [rows * (1 + 2**-10) for rows in embed(self, **kwargs)]
    return stock(family, folder)


def preempted(family: str, folder: Path) -> dict[str, Any]:
    """Requests that each need more blocks as they answer than there are for all of them; alone, then together."""
    engine = engines.start(
        folder, {"script_keep_ratio": RATIO}, max_model_len=96, num_gpu_blocks_override=4, enable_prefix_caching=False
    )
    watch = engines.Watch(engine)
    # Words alone come first: the last to come are the first to give way.
    prompts: list[tuple[str, list[Any]]] = [(tiny.question(family, 0, 2, words=20), [])]
    prompts += [(tiny.question(family, 1, i), [tiny.picture(100, 60, seed=i)]) for i in range(2)]
    told: dict[str, Any] = {"alone": [engines.ask(engine, [prompt])[0] for prompt in prompts]}
    watch.clear()
    engines.forget(engine, answers=False, encoded=True)
    return {**told, "together": engines.ask(engine, prompts), **watch.seen()}


def transfer(role: str) -> Any:
    """vLLM's encoder cache through files in the folder STORE."""
    from vllm.config import ECTransferConfig

    extra = {"shared_storage_path": os.environ["STORE"]}
    return ECTransferConfig(ec_connector="ECExampleConnector", ec_role=role, ec_connector_extra_config=extra)


def separate(role: str, family: str, folder: Path) -> tuple[Any, engines.Watch, list[list[tuple[str, list[Any]]]]]:
    """One half of a disaggregated engine, and questions about one image, and about each of eight others.

    KEEP: the share that stays; without it nothing is configured. SIDE: of the images, in pixels.
    """
    keep, side = os.environ.get("KEEP"), int(os.environ.get("SIDE", "160"))
    settings = {"script_keep_ratio": float(keep)} if keep else {}
    if family.startswith("qwen"):
        settings["max_pixels"] = side * side
    # Encoded by the half that has no language model, an image needs no KV cache there.
    caching = {} if role == "ec_consumer" else {"enable_prefix_caching": False}
    # An engine that only encodes tries every modality that it serves; the tiny models have no videos to try.
    limits = {"image": 4, "video": 0}
    engine = engines.start(
        folder, settings or None, ec_transfer_config=transfer(role), limit_mm_per_prompt=limits, **caching
    )
    prompts = [(tiny.question(family, 1, i), [tiny.picture(side, side, seed=i)]) for i in range(9)]
    return engine, engines.Watch(engine), [prompts[:1], prompts[1:]]


def timed(engine: Any, watch: engines.Watch, prompts: list[Any], method: str) -> dict[str, Any]:
    """Answers, the seconds that all took, and those of one method of the connector."""
    from vllm.distributed.ec_transfer import get_ec_transfer

    connector, spent = get_ec_transfer(), [0.0]
    call = getattr(connector, method)

    def clocked(*arguments: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments, **kwargs)
        spent[0] += time.perf_counter() - start
        return result

    setattr(connector, method, clocked)
    watch.clear()
    start = time.perf_counter()
    answers = engines.ask(engine, prompts)
    seconds = time.perf_counter() - start
    setattr(connector, method, call)
    return {"answers": answers, "seconds": seconds, "moving": spent[0], **watch.seen()}


def stored() -> dict[str, int]:
    """Identities in STORE, and the bytes of the file of each."""
    return {path.parent.name: path.stat().st_size for path in sorted(Path(os.environ["STORE"]).glob("*/*.safetensors"))}


def encoder(family: str, folder: Path) -> dict[str, Any]:
    """The half that encodes, and writes what it encoded."""
    engine, watch, parts = separate("ec_producer", family, folder)
    told: dict[str, Any] = {"warm": stored()}
    for name, prompts in zip(("one", "eight"), parts, strict=True):
        before = stored()
        told[name] = timed(engine, watch, prompts, "save_caches")
        told[name]["files"] = {key: size for key, size in stored().items() if key not in before}
    try:
        told["question"] = engines.ask(engine, parts[0], script_query="text")
    except Exception as error:
        told["question"] = str(error)
    return told


def consumer(family: str, folder: Path) -> dict[str, Any]:
    """The half that answers: from what the other wrote, and then with an encoder run of its own."""
    engine, watch, parts = separate("ec_consumer", family, folder)
    told: dict[str, Any] = {}
    for name, prompts in zip(("one", "eight"), parts, strict=True):
        told[name] = timed(engine, watch, prompts, "start_load_caches")
        told[name]["rows"] = {key: list(rows.shape) for key, rows in engines.runner(engine).encoder_cache.items()}
    for path in Path(os.environ["STORE"]).glob("*/*.safetensors"):
        path.unlink()
    engines.forget(engine, encoded=True)
    told["own"] = {"answers": engines.ask(engine, parts[0] + parts[1]), **watch.seen()}
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
    scenario, family = sys.argv[1:3]
    folder = Path(os.environ.get("MODEL", sys.argv[3]))
    if not folder.exists():
        tiny.save(family, folder, torch.bfloat16 if scenario == "half" else torch.float32)
    scenarios = (pruned, stock, planted, preempted, encoder, consumer, half)
    told = next(one for one in scenarios if one.__name__ == scenario)(family, folder)
    print("TOLD", json.dumps(told))
