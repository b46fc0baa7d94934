"""Bounds that the command line checks before anything heavy is imported."""

MAX_DRAFT_TOKENS = 64
