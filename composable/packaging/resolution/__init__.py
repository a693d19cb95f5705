"""Resolution: from requirements to one version of each package, or an explanation."""
