"""Real emoji by many artists: one vocabulary in many styles, with a trained text encoder."""
