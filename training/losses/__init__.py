"""Losses: pure functions of tensors, one term each; weights belong to the modes."""
