"""Signatures of registries: keys, statements on releases, and TUF metadata over what is listed."""
