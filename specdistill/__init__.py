"""SpecDistill: make a draft model for your target and your prompts, distil it, and score it by real
speculative decoding.
"""

__version__ = "0.1.0"
