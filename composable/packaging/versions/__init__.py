"""Versions, ranges and names. The lowest room of packaging."""
