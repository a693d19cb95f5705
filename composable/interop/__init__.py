"""Formats of other projects: Hugging Face folders and GGUF files, read one tensor at a time."""
