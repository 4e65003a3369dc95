"""Regions: maps over the picture, and parts of the sampling run, in which experts act.

A map multiplies an expert's gate at every position of every adapted layer: no further pass of the model is needed.

- `maps`: checks and resizes maps. `picture`: size of the picture in a forward pass.
- `layouts`: which layers see text, and where the picture's tokens are in a sequence that holds both.
- `factors`: the factor of every unit of a layer. `attention`: cross attention, whose keys and values are of the text.
"""
