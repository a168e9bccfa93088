"""Embedded data: digit scenes and docstrings, and a reader of real sets in COCO's format."""
