"""Programs outside of this one that score a pair, or answer for a target."""
