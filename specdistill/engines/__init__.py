"""Programs outside of this one that generate or score."""
