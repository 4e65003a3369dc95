"""Findings: faults and risks of LoRAs that are to be merged, each in one sentence with its value and its threshold."""
