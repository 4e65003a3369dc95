"""Nodes that compare: a report of LoRAs, and a sheet of pictures."""
