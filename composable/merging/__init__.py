"""Merging: matrices of several experts that derive from one become the matrices of a new one.

Pure arrays, one file per family of methods, each with its paper. Deliberately not here: packages,
models and text; `workflows/merge.py` brings them, and chooses a method by evidence.
"""
