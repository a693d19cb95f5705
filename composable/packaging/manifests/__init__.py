"""Manifests: what a package says of itself, and how it is read and written."""
