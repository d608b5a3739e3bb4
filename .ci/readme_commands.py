"""Print the shell commands under a heading of the README: `python .ci/readme_commands.py Tests`."""

import re
import sys
from pathlib import Path


def shell_commands(heading: str, readme: Path = Path("README.md")) -> list[str]:
    """Return the lines of the `sh` blocks between a heading and the next of any level."""
    text = readme.read_text(encoding="utf-8")
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.M | re.S)
    if section is None:
        raise SystemExit(f"{readme} has no section '{heading}'")
    blocks = re.findall(r"^```sh\n(.*?)^```", section[1], re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


if __name__ == "__main__":
    print("\n".join(shell_commands(sys.argv[1])))
