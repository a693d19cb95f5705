"""Registries: what they hold, where their files are stored, and how they are reached."""
