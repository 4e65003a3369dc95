"""A small diffusion model of our own, really trained: for the demo, the benchmark and the tests.

SD3's architecture with three blocks, pictures of 64 pixels, prompts of words. ``benchmarks/nano`` trained the weights.
"""
