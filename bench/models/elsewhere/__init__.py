"""Weights that were trained elsewhere: found, read, and put into a model beside its prior."""
