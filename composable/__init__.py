"""composable: experts that never met, plugged together."""
