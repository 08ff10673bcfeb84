"""Smoke test of an installed wheel: python smoke.py SOURCE_TREE, run from outside that tree."""

import pathlib
import sys

import torch

import script_kernels

package = pathlib.Path(script_kernels.__file__).resolve()
source = pathlib.Path(sys.argv[1]).resolve()
if source in package.parents:
    sys.exit(f"imported {package}, which is the source tree and not the wheel")
if not (package.parent / "py.typed").exists():
    sys.exit("the wheel has no py.typed")

generator = torch.Generator().manual_seed(0)
tokens = torch.randn(2, 576, 64, generator=generator)
query = torch.randn(1, 4, 64, generator=generator)
for asked in (None, query):
    kept = script_kernels.prune(tokens, asked, 64)
    if kept.shape != (2, 64) or kept.dtype != torch.int64:
        sys.exit(f"prune: expected int64 of shape (2, 64), got {kept.dtype} of shape {tuple(kept.shape)}")
    if not bool((kept[:, 1:] > kept[:, :-1]).all()) or int(kept.min()) < 0 or int(kept.max()) >= 576:
        sys.exit("prune: indices are not ascending, distinct and in range")

gathered = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
print(f"script-kernels {script_kernels.__version__}: kept {gathered.shape[1]} of {tokens.shape[1]} tokens per image")
