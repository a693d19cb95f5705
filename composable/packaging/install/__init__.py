"""Installation: the store, downloads, the lock and the environment."""
