"""The engine. Knows no host: imports torch, numpy, safetensors and a few small packages only.

Glossary. A letter means this everywhere, unless a docstring says otherwise.

LoRAs (`adapter`, `lowrank`):

- *adapter*: one LoRA as data; ``N`` adapters. *module*: a layer named in an adapter. *layer*: a layer of a model,
  with its matrix ``W (d_out, d_in)``; a convolution's ``d_in`` is input channels times kernel size.
- *factors* ``A_i (r_i, d_in)`` and ``B_i (d_out, r_i)`` of adapter `i`, of rank ``r_i``; ``scale_i = alpha_i / r_i``.
- *weight* ``w_i``: a merge coefficient. *strength*: a user's slider.
- *delta*, the change of a layer: ``delta_i = w_i scale_i B_i A_i``. Its *energy* is ``|delta_i|_F^2``.
- *diff*: a full tensor that is added to a parameter, such as a bias. *extra*: any other tensor of the file, carried
  along. Both are a merge's *leftovers*.
- *convert rank*: rank at which LoHa, LoKr and full deltas are approximated.
- *source*: file, hash and format of an adapter. *identity*: the hash that tells an adapter from all others
  (`digest.identity`). *digest*: any SHA-256 of tensors. *fingerprint*: a quick hash of a file's ends.

Names (`formats`, `layers`):

- *host*: ComfyUI, diffusers or transformers. *format*: a way to store a LoRA in a file. *dialect*: a way to name
  layers. *spelling*: prefix and punctuation of a dialect's names.
- *key map*: module name -> the layers it changes in another dialect, with their rows. *span*: a range of rows.
- *align*: bring adapters to common module names.

Merging (`merge`, `recipes`):

- *unit*: one row ``a_j`` of ``A`` with its column ``b_j`` of ``B`` (the paper's Minimal Semantic Unit), the rank-one
  matrix ``b_j a_j^T``. *balanced* units are those of an adapter's SVD, ``A = sqrt(S) V^T`` and ``B = U sqrt(S)``.
- *pool*: the ``P = sum_i r_i`` units of each of ``M`` modules of one shape, merged as one *batch*; ``c (M, P)`` are
  their coefficients ``w scale``. *owner*: the adapter of each unit.
- *Gram matrices* ``G_A = A A^T`` and ``G_B = B^T B``, ``(M, P, P)``; ``G`` is any Gram matrix of units.
- ``k``: merged rank. ``R_A (k, P)``, ``R_B (P, k)``: merged factors as combinations of pooled units, ``R_A A`` and
  ``B R_B``. *labels*: the cluster of each unit. *centroid*: the unit that replaces a cluster.
- ``U``, ``S``, ``V``: singular vectors and values. ``L``: a matrix with ``L L^T = G``.
- *statistics*: *second moments* ``C = X^T X / n`` of a module's inputs ``X (n, d_in)``, for every *kind* of prompts:
  ``C_i`` for those that name the concept of adapter `i` alone, ``C_S`` for several, ``C_0`` for none. *sketch*:
  second moments reduced to the directions in which the inputs are largest.
- *report*: what a merge did. *recipe*: a merge as data, from which `run` repeats it. *conversion*: a change of format
  or dtype after it. *plan*: how work is divided before it starts (batches of a merge, layers of a measurement).

Mixing (`mole`, `train`):

- *mixture*: adapters that are kept apart, its *experts*, with gates. *bank*: a mixture prepared for one model.
  *stack*: the experts' factors of one layer side by side, ``D (R, d_in)`` and ``U (d_out, R)`` with ``U_i D_i =
  delta_i``, and ``z = D x (.., R)``; *owner* is then the expert of each row.
- *gate*: ``g (N,)``, how much of each expert is added, from the features ``f (F,)`` that it *reads*.
- *scope*: the part of the model that one gate rules; its size is the *granularity*. *block*: the innermost numbered
  part of a model with several layers.
- *concept*: what an expert shows, named in prompts by its words. *detector*: scores whether a text names the
  concepts; the score is a concept's *presence*. *router*: gates from the words of a prompt, without training.
- *region*: the part of the picture in which an expert acts, given by a *map* ``(H, W)`` of 0 .. 1. *steps*: the part of
  the sampling run in which it acts. Both become *factors* of an expert's units at each position of a layer.
- *pass*: one forward pass of the model. *record*: gate values of passes. *freeze*: make one LoRA of a mixture with
  its gates at their recorded mean.
- ``B``, ``T``: samples of a batch and positions (tokens) in shapes of activations; ``t`` noise level; ``x`` latents
  or a layer's input; ``tau`` temperature of a softmax, ``q_i`` mean gate of expert `i` (balance loss).

Reports (`survey`, `pictures`):

- *overlap*: cosine of two deltas. *spectrum*: singular values. *region*: first, middle or last blocks of a model.
- *finding*: a sentence of the summary. *canvas*: an image that is drawn on. *sheet*: several with labels.
"""

__version__ = "0.1.0"
