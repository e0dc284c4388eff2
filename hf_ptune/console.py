"""What commands print, whatever the terminal can show."""

import io
import sys


def let_print() -> None:
    """Let stdout escape what its encoding lacks, as stderr does: texts of rows, labels and paths may hold any sign."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
