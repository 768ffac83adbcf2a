"""Print the table of docs/rome.md from the rows that `reference_bank solve` left.

python -m benchmarks.rome_table docs/data/rome_100.jsonl.xz
"""

from __future__ import annotations

import lzma
import sys

from guardedit.evaluation.state import CaseResult
from guardedit.evaluation.summary import markdown, summarise


def main() -> None:
    """Read the rows and print the table."""
    with lzma.open(sys.argv[1], "rt", encoding="utf-8") as lines:
        results = [CaseResult.model_validate_json(line) for line in lines]
    about = {"editor": "rome", "prompts": ["raw", "chat"]}
    seconds = sum(result.seconds for result in results)
    found = summarise(results, about=about, n_seen=len(results), seconds=seconds, seed=0)
    sys.stdout.write(markdown(found) + "\n")


if __name__ == "__main__":
    main()
