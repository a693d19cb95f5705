"""Projects: `composable.toml`, and the commands that change, lock and install it."""
