"""Nodes that compare: a report on LoRAs, and a grid of images."""
