"""The engine. Knows no host: imports torch, numpy, safetensors and a few small packages only.

Glossary, used everywhere:

- ``N`` adapters, module ``m`` with weight ``W (d_out, d_in)``, factors ``A_i (r_i, d_in)`` and ``B_i (d_out, r_i)``;
- ``scale_i = alpha_i / r_i``, ``strength`` a user's slider, ``weight`` a merge coefficient w_i;
- ``delta_i = w_i * scale_i * B_i @ A_i``;
- a *unit* (the paper's Minimal Semantic Unit) is one row of ``A`` with its column of ``B``;
- a *pool* holds the ``P = sum_i r_i`` units of one module; ``k`` is the merged rank.
"""

__version__ = "0.1.0"
