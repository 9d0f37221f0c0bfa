"""Dropout whose masks cost little on a CPU.

PyTorch draws a CPU's masks one number at a time on one thread, which takes about as long as the products
of matrices that follow. Here one draw of 64 bits decides about four numbers.
"""

import torch
from torch import Tensor, nn

_LEVELS = 2**16  # values of the 16 bits that decide about one number


class Dropout(nn.Dropout):
    """As `nn.Dropout`, but on a CPU the share that is kept is rounded to a multiple of 1/65,536.

    What is kept is divided by that rounded share, so that the expected value is exactly x. The numbers
    come from PyTorch's generator: the same seed gives the same masks. On other devices this is `nn.Dropout`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (...) -> (...), in training with the share p of its numbers set to 0."""
        kept_levels = round((1 - self.p) * _LEVELS)
        is_plain = x.device.type != "cpu" or self.inplace or not self.training
        if is_plain or kept_levels in (0, _LEVELS):
            return super().forward(x)
        mask: Tensor = torch.ops.m2rec.draw_mask(x.detach(), kept_levels)
        return x * mask


def draw_mask(x: Tensor, kept_levels: int) -> Tensor:
    """A mask of x's shape and type: `_LEVELS / kept_levels` with that share inverted, else 0."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    levels = bits.random_(-(2**63), None).view(torch.int16)[: x.numel()]  # all 64 bits
    mask = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ge(levels.view(x.shape), _LEVELS // 2 - kept_levels, out=mask)
    return mask.mul_(_LEVELS / kept_levels)


def _make_fake_mask(x: Tensor, kept_levels: int) -> Tensor:
    """What `draw_mask` returns, without its values."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# a registered operator is one call for the compiler, whose own random numbers are slow on a CPU
_OPERATORS = torch.library.Library("m2rec", "FRAGMENT")
_OPERATORS.define("draw_mask(Tensor x, int kept_levels) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_OPERATORS.impl("draw_mask", draw_mask, "CPU")
torch.library.register_fake("m2rec::draw_mask", _make_fake_mask, lib=_OPERATORS)
