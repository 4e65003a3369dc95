"""Surveys: several adapters compared before a merge, as numbers, findings in sentences, a picture and a page."""
