"""Scoring a pair by real speculative decoding: measurement, statistics, verdict."""
