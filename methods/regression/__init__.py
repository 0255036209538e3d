"""Regression on the forward process: finished samples are noised again, and the network learns there by reward."""
