"""Files: atomic writes, content addresses and checked tensor files."""
