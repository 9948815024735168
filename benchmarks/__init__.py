"""Benchmarks of the operations, run by hand: see README.md."""
