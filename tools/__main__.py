"""The list of tools: python -m tools"""

from __future__ import annotations

from pathlib import Path

from jobs.__main__ import show

if __name__ == "__main__":
    show(Path(__file__).parent)
