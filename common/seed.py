"""Every random draw comes from a generator seeded by what it is for, never from global state."""

import hashlib

import torch


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on all arguments: `seed_of(0, "augment", epoch, step)`."""
    key = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for one purpose, e.g. `generator(seed, "augment", epoch, step)`."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, *numbers))
