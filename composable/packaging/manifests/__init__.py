"""Manifests: the metadata of packages, how it is read, written and filled in."""
