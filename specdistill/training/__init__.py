"""Distillation: a run, its step, its losses, and where its texts come from."""
