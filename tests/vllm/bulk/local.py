"""The example on a Ray that runs more at once than a small machine has cores: python local.py ARGUMENTS."""

import runpy
import sys
from pathlib import Path

import ray

if __name__ == "__main__":
    ray.init(num_cpus=8, include_dashboard=False)
    example = Path(__file__).parents[3] / "examples" / "ray_data.py"
    sys.argv[0] = str(example)
    runpy.run_path(str(example), run_name="__main__")
