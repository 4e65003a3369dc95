"""Nodes that mix LoRAs by gates, train the gates and measure statistics."""
