"""Benchmarks of the ops: see bench/README.md."""
