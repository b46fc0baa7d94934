"""Prompts, how they are put to models, and answers with the signal of the target."""
