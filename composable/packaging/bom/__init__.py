"""Bills of materials: what a locked project consists of, in formats that other tools read."""
