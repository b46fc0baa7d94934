"""Outside engines that score a pair: Transformers' assisted generation, and vLLM."""
