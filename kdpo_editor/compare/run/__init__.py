"""Computes a comparison: cells, protocol, evaluation, data sets, methods."""
