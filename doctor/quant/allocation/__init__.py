"""Bits under a budget: what each choice for a linear costs and hurts, and which of them to take (`--bpw`, `--size`)."""
