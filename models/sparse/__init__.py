"""Sparse coding: proximal operators, ADMM, dictionaries. Imports torch only."""
