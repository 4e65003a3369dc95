"""A small, fully trained diffusion model for the demo, the benchmark and the tests.

SD3's architecture with three blocks, images of 64 x 64 pixels, a vocabulary of 77 words and marks. ``benchmarks/nano``
trained the weights.
"""
