"""Attacks on images: what they climb is an argument, so one function serves training and evaluation, whatever a network
returns.

`objectives`: losses per image; `ball`: what an attack may change; `masked`: signs that gradients are masked; `auto`:
AutoAttack and Square.
"""

from common.attacks.apgd import apgd, apgd_targeted
from common.attacks.pgd import fgsm, pgd

__all__ = ["apgd", "apgd_targeted", "fgsm", "pgd"]
