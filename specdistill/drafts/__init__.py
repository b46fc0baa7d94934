"""Draft models: made from layers of the target, saved, exported for serving engines."""
