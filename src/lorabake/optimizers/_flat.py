"""One flat buffer for all trained weights of a learning rate, and one for their gradients.

Hundreds of small tensors become one: the optimizer step, clipping, zeroing and the finite check are a call each. The parameters
themselves stay where they are used; only their memory is shared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorabake.protocols.optimizer import Sight


class FlatGroup:
    """Parameters that share a learning rate, packed. ``values`` is what the optimizer steps on; its ``grad`` is the packed gradient."""

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name = name
        total = sum(parameter.numel() for parameter in parameters.values())
        first = next(iter(parameters.values()))
        self.values = nn.Parameter(torch.empty(total, dtype=torch.float32, device=first.device))
        self.values.grad = torch.zeros_like(self.values)
        self._parameters = tuple(parameters.values())
        start = 0
        for parameter in parameters.values():
            end = start + parameter.numel()
            parameter.data = _shaped(self.values.data[start:end], parameter).copy_(parameter.detach())
            parameter.grad = _shaped(self.values.grad[start:end], parameter)
            start = end

    def as_seen(self, sight: Sight) -> list[nn.Parameter]:
        """The same weights with the same gradients as an optimizer sees them: the flat buffer, or views of it."""
        if sight == "flat":
            return [self.values]
        found = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            shape = tuple(parameter.shape)
            if len(shape) > 2:
                shape = (shape[0], -1)
            elif len(shape) < 2 and sight == "matrices":
                shape = (1, -1)
            view = nn.Parameter(parameter.detach().view(shape))
            view.grad = parameter.grad.view(shape)
            found.append(view)
        return found

    @property
    def gradient(self) -> Tensor:
        """The packed gradient."""
        assert self.values.grad is not None
        return self.values.grad

    def zero_gradient(self) -> None:
        """Forget the gradient, in place: the parameters' own gradients are views of it."""
        self.gradient.zero_()


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """A parameter's part of a buffer, in its shape; column by column where it lies in memory like that."""
    columns = like.dim() >= 2 and not like.is_contiguous() and like.transpose(0, 1).is_contiguous()
    return part.view(like.transpose(0, 1).shape).transpose(0, 1) if columns else part.view(like.shape)


def clip_gradients(groups: list[FlatGroup], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most ``max_norm`` (0 = never); returns the norm before, 0-d.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_``.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(group.gradient) for group in groups]))
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if norm.device.type == "cpu" and factor == 1:  # asking a GPU would mean to wait for it
            return norm
        for group in groups:
            group.gradient.mul_(factor)
    return norm
