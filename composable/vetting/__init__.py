"""Evaluation, the checks that an expert must pass, and the card that records them."""
