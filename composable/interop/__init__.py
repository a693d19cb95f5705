"""Other people's formats: Hugging Face folders and GGUF files, read one tensor at a time."""
