"""Answers with real weights: lmms-eval, pruned. `bench/accuracy.md` says how to run it and what it found.

python -m bench.accuracy --preset llava-1.5-7b                   # every row on every task, one table
python -m bench.accuracy one --folder DIR --pruning '{"keep": 64, "method": "divprune"}' -- --model llava_hf ...
"""
