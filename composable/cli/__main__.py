"""`python -m composable.cli` is `composable`."""

from composable.cli.main import run

run()
