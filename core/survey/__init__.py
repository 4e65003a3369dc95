"""Several adapters, examined together: numbers, findings in sentences, a picture and a page."""
