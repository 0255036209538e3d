"""Figures of a comparison, a module per kind: PNG and SVG in one style, with the same bytes every time."""
