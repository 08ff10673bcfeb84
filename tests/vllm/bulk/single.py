"""What one engine in one process says about each image of a folder: python single.py MODEL IMAGES; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engines
from PIL import Image
from test_ray_data import KEEP, QUESTION, TOKENS
from vllm import SamplingParams

if __name__ == "__main__":
    engine = engines.start(Path(sys.argv[1]), {"script_keep_ratio": KEEP})
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
    told = {}
    for path in sorted(Path(sys.argv[2]).iterdir()):
        image = {"type": "image_pil", "image_pil": Image.open(path)}
        content = [image, {"type": "text", "text": QUESTION}]
        (result,) = engine.chat([{"role": "user", "content": content}], sampling, use_tqdm=False)
        told[path.name] = [result.outputs[0].text, len(result.prompt_token_ids)]
    print("TOLD", json.dumps(told))
