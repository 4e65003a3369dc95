"""Nodes that mix LoRAs by gates, train gates, and measure statistics."""
