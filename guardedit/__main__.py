"""`python -m guardedit` is the same as `guardedit`."""

from __future__ import annotations

from guardedit.cli import main

if __name__ == "__main__":
    main()
