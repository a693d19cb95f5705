"""Workflows: train, vet, publish, import and export. Each reads, makes, measures and writes."""
