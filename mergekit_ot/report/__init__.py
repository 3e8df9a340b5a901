"""Measurements of a merge, and the page that shows them."""
