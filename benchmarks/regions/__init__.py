"""Regions: what they cost, and how well they keep LoRAs apart."""
