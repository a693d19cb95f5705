"""Hurting packaging on purpose: killed, cut off, crowded, out of room, lied to.

`python -m benchmarks.faults` runs all of it; the tests run a small part of the same code. The model
of the disk, the assumptions and the figures are in `docs/results/faults.md`.
"""
