"""The images that an attack may choose from: within a distance of the original and in [0, 1], per image.

N images of any shape (N, ...), floats in [0, 1].
"""

import torch
from torch import Generator, Tensor

# Images are then within 2e-4 of the radius from the nearest, 1e-5 as a rule; each round is ten passes over the pixels.
_ROUNDS = 3


class Ball:
    """Images within `eps` of x0 (N, ...) that lie in [0, 1], as does x0.

    A row of `NORMS` defines the distance, the projection, the direction in which a loss grows fastest, and the noise.
    """

    def __init__(self, x0: Tensor, eps: float):
        self.x0, self.eps = x0, eps

    def project_(self, x: Tensor) -> Tensor:
        """The nearest images of the set, in the memory of x."""
        raise NotImplementedError

    def contains(self, x: Tensor) -> Tensor:
        """Which images belong to the set, but for rounding: (N,) bool."""
        return (self.distance(x, self.x0) <= self.eps + 1e-6) & ((x >= 0) & (x <= 1)).flatten(1).all(1)

    def noise(self, generator: Generator) -> Tensor:
        """Uniform in the ball, whatever [0, 1] allows: (N, ...). The generator is on the images' device."""
        raise NotImplementedError

    @staticmethod
    def direction(grad: Tensor) -> Tensor:
        """Of the steepest ascent, of norm 1, from gradients (N, ...): in new memory; 0 where they are 0 or NaN."""
        raise NotImplementedError

    @staticmethod
    def distance(x: Tensor, y: Tensor) -> Tensor:
        """Between images x and y: (N,)."""
        raise NotImplementedError


class LinfBall(Ball):
    """No pixel is changed by more than eps."""

    def __init__(self, x0: Tensor, eps: float):
        super().__init__(x0, eps)
        self.low, self.high = (x0 - eps).clamp_(min=0), (x0 + eps).clamp_(max=1)

    def project_(self, x: Tensor) -> Tensor:
        return x.clamp_(self.low, self.high)

    def noise(self, generator: Generator) -> Tensor:
        x = self.x0
        uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return uniform.mul_(2 * self.eps).sub_(self.eps)

    @staticmethod
    def direction(grad: Tensor) -> Tensor:
        return grad.sign()  # The sign of NaN is 0.

    @staticmethod
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs_().flatten(1).amax(1)


class L2Ball(Ball):
    """The Euclidean norm of the change is at most eps.

    Rescaling to the ball and then clipping to [0, 1] leaves unused what the clipped pixels take of the norm. The
    nearest image of both sets is clip(x0 + s (x - x0)) with the largest s <= 1 that keeps to the ball. It is found from
    below: given which pixels are clipped, s follows; a larger s clips more of them.
    """

    def __init__(self, x0: Tensor, eps: float):
        super().__init__(x0, eps)
        self.low, self.high = -x0, 1 - x0

    def project_(self, x: Tensor) -> Tensor:
        d = x.sub_(self.x0)
        square, tiny = d.square(), torch.finfo(x.dtype).tiny
        s = (self.eps / _total(square).clamp_min(tiny).sqrt()).clamp_max(1)
        scaled, inside = torch.empty_like(d), torch.empty_like(d)
        for _ in range(_ROUNDS):
            torch.mul(d, s, out=scaled)
            torch.clamp(scaled, self.low, self.high, out=inside)
            clipped = scaled.sub_(inside).abs_().sign_()  # 1 or 0: masks of bool are ten times as slow on a CPU.
            left = self.eps**2 - _total(inside.square_().mul_(clipped))
            free = _total(torch.addcmul(square, square, clipped, value=-1, out=clipped))
            # Rounding must not shrink it again.
            s = torch.maximum(s, (left.clamp_min(0) / free.clamp_min(tiny)).sqrt().clamp_max(1))
        d.mul_(s).clamp_(self.low, self.high)
        # What rounding has left over.
        d.mul_((self.eps / _norm(d).clamp_min(tiny)).clamp_max(1))
        return d.add_(self.x0).clamp_(0, 1)

    def noise(self, generator: Generator) -> Tensor:
        x = self.x0
        normal = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        radius = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device).pow_(1 / x[0].numel())
        return self.direction(normal).mul_(per_image(radius.mul_(self.eps), x))

    @staticmethod
    def direction(grad: Tensor) -> Tensor:
        tiny, grad = torch.finfo(grad.dtype).tiny, grad.nan_to_num()
        # Squares of the gradients of saturated outputs underflow.
        grad.div_(_largest(grad).clamp_min(tiny))
        return grad.div_(_norm(grad).clamp_min(tiny))

    @staticmethod
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return _norm(x - y).flatten()


NORMS: dict[str, type[Ball]] = {"linf": LinfBall, "l2": L2Ball}


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Values (N,) in a shape that broadcasts over images x (N, ...)."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def replace_(images: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """Put the chosen (N,) bool of the other images in the place of `images`, without waiting for the device."""
    # Exact for weights 0 and 1 of finite numbers, and on a CPU ten times as fast as `torch.where`.
    return images.lerp_(others, per_image(chosen.to(images.dtype), images))


def _pixels(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _total(x: Tensor) -> Tensor:
    return x.sum(_pixels(x), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=_pixels(x), keepdim=True)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(_pixels(x), keepdim=True)
