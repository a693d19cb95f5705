"""The one meeting place of packages and models: load, save, train, vet, publish, plug in."""
