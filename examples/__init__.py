"""Examples: run one from the root of the repository as `python -m examples.NAME`."""
