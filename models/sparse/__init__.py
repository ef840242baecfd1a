"""Sparse coding: shrinkage, ADMM, dictionaries. Imports torch only."""
