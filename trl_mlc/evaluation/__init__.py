"""What to measure, per language, before and after: preferences, agreement, geometry, perplexity.

Import from the files: `geometry`, `preferences`, `report`.
"""
