"""Modes: each builder reads the flags it needs and returns a recipe. Below this line nothing knows a flag."""
