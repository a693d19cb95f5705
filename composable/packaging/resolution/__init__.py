"""Resolution: from requirements to one version of each package, or why there is none."""
