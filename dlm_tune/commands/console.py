"""Output of the commands."""

import os


def say(*lines: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)
