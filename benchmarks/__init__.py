"""Benchmarks: `python -m benchmarks`, on Linux with glibc."""
