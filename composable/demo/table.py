"""The demo's table, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from composable.demo.report import METHODS, best_method, format_bits, method_label, text_rows
from composable.demo.result import Measurements

if TYPE_CHECKING:
    from rich.console import Console


def print_table(measured: Measurements, console: Console) -> None:
    """Print bits per byte of every text under every method, and the recovery.

    Args:
        measured: Measurements of the demo.
        console: Where to print; 80 columns are enough.
    """
    table = Table(title="Bits per byte on held-out text (lower is better)", title_justify="left")
    table.add_column("text", overflow="ellipsis", no_wrap=True, max_width=24)
    for method in METHODS:
        table.add_column(method_label(method), justify="right", no_wrap=True)
    for name, row in text_rows(measured):
        best = best_method(row)
        cells = [Text(format_bits(row.get(m)), style="bold" if m == best else "") for m in METHODS]
        table.add_row(Text(name), *cells)
    table.add_section()
    recovery = [f"{share:.1%}" for share in (measured.recovery.mix, measured.recovery.safe)]
    table.add_row("recovery", "", "", "", *recovery, style="bold")
    console.print(table)
