"""Nodes that load, merge, apply and save LoRAs."""
