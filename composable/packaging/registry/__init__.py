"""Registries: what they hold, where their files lie, and how they are reached."""
