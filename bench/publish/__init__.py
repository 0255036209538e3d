"""Finished runs as a package that others can check: pack, merge, reproduce, verify."""
