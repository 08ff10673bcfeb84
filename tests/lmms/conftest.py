"""The tests of the accuracy run on the real lmms-eval: make test-lmms. No network: models and tasks are made here."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ |= {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
}  # fmt: skip
