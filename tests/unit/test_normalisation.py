"""Is the closed form of the normalisation's derivative that of its operations?"""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from entropy_ddp.model.forward_mode import dual_parameters, halves
from entropy_ddp.model.normalisation import closed_form_normalisation
from entropy_ddp.model.precision import true_float64

WIDTH = 7
TOLERANCES = {"rtol": 1e-12, "atol": 1e-13}
NORMS = [LlamaRMSNorm, Qwen3RMSNorm, Gemma2RMSNorm, Olmo2RMSNorm]


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_norm(kind: type[nn.Module]) -> nn.Module:
    norm = kind(WIDTH, eps=0.1).double()
    norm.weight.data = random(WIDTH, seed=3)
    return norm


def differentiate(norm: nn.Module, closed: bool, parts: str) -> tuple[Tensor, Tensor]:
    """Value and tangent on three dimensions, tangents of `x`, of `w`, or of both."""
    x, dx, dw = random(2, 3, WIDTH, seed=0), random(2, 3, WIDTH, seed=1), None
    dw = random(WIDTH, seed=2)
    weight = norm.weight
    with torch.no_grad(), true_float64(), forward_ad.dual_level():
        if "w" in parts:
            norm._parameters["weight"] = forward_ad.make_dual(weight.detach(), dw)
        given = forward_ad.make_dual(x, dx) if "x" in parts else x
        try:
            if closed:
                with closed_form_normalisation(norm):
                    assert "forward" in vars(norm)
                    result = halves(norm(given))
            else:
                result = halves(norm(given))
        finally:
            norm._parameters["weight"] = weight
    return result


@pytest.mark.parametrize("parts", ["x", "w", "xw"])
@pytest.mark.parametrize("kind", NORMS)
def test_the_closed_form_is_that_of_the_operations(
    kind: type[nn.Module], parts: str
) -> None:
    norm = make_norm(kind)
    found, expected = (differentiate(norm, closed, parts) for closed in (True, False))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **TOLERANCES)
    assert "forward" not in vars(norm)


def test_without_tangents_values_stay_plain() -> None:
    norm = make_norm(LlamaRMSNorm)
    value, tangent = differentiate(norm, True, "")
    assert tangent is None
    assert torch.equal(value, differentiate(norm, False, "")[0])


class Halved(LlamaRMSNorm):
    """Has the name and the attributes, and does something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / 2


@pytest.mark.parametrize(
    "module", [Halved(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)]
)
def test_other_modules_are_left_alone(module: nn.Module) -> None:
    with torch.no_grad(), closed_form_normalisation(module):
        assert "forward" not in vars(module)


def test_a_failure_restores_the_modules() -> None:
    norm = make_norm(LlamaRMSNorm).float()
    with pytest.raises(KeyboardInterrupt), dual_parameters(norm, {}, {}):
        assert "forward" in vars(norm)
        raise KeyboardInterrupt
    assert "forward" not in vars(norm)


class Interrupting(Halved):
    """Ends while it is asked what it gives."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_a_failure_on_the_way_in_restores_the_modules() -> None:
    norms = nn.Sequential(LlamaRMSNorm(WIDTH), Interrupting(WIDTH))
    with pytest.raises(KeyboardInterrupt), closed_form_normalisation(norms):
        pass
    assert "forward" not in vars(norms[0])


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_bfloat16_values_are_the_modules_own(kind: type[nn.Module]) -> None:
    norm = kind(64).bfloat16()
    x, dx = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad(), forward_ad.dual_level(), closed_form_normalisation(norm):
        assert "forward" in vars(norm)
        value, tangent = halves(norm(forward_ad.make_dual(x, dx)))
    assert torch.equal(value, norm(x))
    assert tangent is not None
    assert tangent.dtype == torch.bfloat16
    wide = kind(64)
    with torch.no_grad(), forward_ad.dual_level():
        exact = halves(wide(forward_ad.make_dual(x.float(), dx.float())))[1]
    assert exact is not None
    torch.testing.assert_close(tangent.float(), exact, rtol=0.02, atol=0.02)
