"""Copies the sections marked [shared] of train_gpt.py into train_gpt_mlx.py; --check only says whether they differ."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULE = "# " + "=" * 118


def sections(text: str) -> list[str]:
    """The text before the first box, then one part a box: a rule, the title line, comments, a rule, code."""
    starts = []
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.rstrip() == RULE and re.match(r"# [A-Z]{2}", (lines + [""])[i + 1]):
            starts.append(i)
    bounds = [0, *starts, len(lines)]
    return ["".join(lines[a:b]) for a, b in zip(bounds, bounds[1:])]


def title(section: str) -> str:
    """The title in the second line of a box."""
    return section.splitlines()[1].removeprefix("# ")


def main() -> int:
    source, target = ROOT / "train_gpt.py", ROOT / "train_gpt_mlx.py"
    theirs = {title(part): part for part in sections(source.read_text())[1:]}
    old = sections(target.read_text())
    new = old[:1] + [theirs[title(part)] if title(part).endswith("[shared]") else part for part in old[1:]]
    if new == old:
        print("shared sections are equal")
        return 0
    if "--check" in sys.argv:
        print("shared sections differ; run `python tests/sync_shared.py`")
        return 1
    target.write_text("".join(new))
    print("copied the shared sections of train_gpt.py into train_gpt_mlx.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
