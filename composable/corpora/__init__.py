"""Corpora: documents, and how they are made from packages of text by recipe."""
