"""A judge of pruning: a small LLaVA-like model, trained from scratch, that answers questions about composed scenes.

    python -m bench.judge train --seed 0                        # weights/seed0.safetensors; resumable
    python -m bench.judge evaluate --seed 0 --split val         # every setting
    python -m bench.judge evaluate --seed 0 --split test        # what RULE.md lets through
    python -m bench.judge report                                # results/test.md, docs/judge.png

Without weights and results in their folders, nothing has been decided by it yet.
"""
