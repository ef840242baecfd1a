"""Modes: each builder reads the flags it needs and returns a recipe. Below this line nothing knows a flag."""

from common.negatives import pick_negatives as pick_negatives
