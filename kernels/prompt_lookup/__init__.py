"""Draft tokens for documents whose outputs quote them: what followed the newest tokens where they stood before."""

from kernels.prompt_lookup.api import find_drafts

__all__ = ["find_drafts"]
