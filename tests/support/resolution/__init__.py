"""What is right for a universe, found without the resolver."""
