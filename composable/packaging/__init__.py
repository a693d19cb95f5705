"""Experts as packages. Never JAX."""
