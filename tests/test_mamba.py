"""Mixers: parameters of mamba_ssm, initial values, causality, both backends."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.branch import ItemBatch
from m2rec.nn.mamba import DT_MAX, DT_MIN, GatedRMSNorm, Mamba, Mamba2

D, N, E, R = 32, 8, 64, 2


def test_mamba_state_dict_is_that_of_mamba_ssm():
    shapes = {name: tuple(value.shape) for name, value in Mamba(D, N).state_dict().items()}
    assert shapes == {
        "A_log": (E, N),
        "D": (E,),
        "in_proj.weight": (2 * E, D),
        "conv1d.weight": (E, 1, 4),
        "conv1d.bias": (E,),
        "x_proj.weight": (R + 2 * N, E),
        "dt_proj.weight": (E, R),
        "dt_proj.bias": (E,),
        "out_proj.weight": (D, E),
    }


def test_mamba2_state_dict_is_that_of_mamba_ssm():
    H, P = 4, 16
    shapes = {name: tuple(v.shape) for name, v in Mamba2(D, N, head_dim=P).state_dict().items()}
    assert shapes == {
        "dt_bias": (H,),
        "A_log": (H,),
        "D": (H,),
        "in_proj.weight": (2 * E + 2 * N + H, D),
        "conv1d.weight": (E + 2 * N, 1, 4),
        "conv1d.bias": (E + 2 * N,),
        "norm.weight": (E,),
        "out_proj.weight": (D, E),
    }


def test_initial_values():
    mamba, mamba2 = Mamba(D, N), Mamba2(256, N, head_dim=8)
    for bias in (mamba.dt_proj.bias, mamba2.dt_bias):
        dt = F.softplus(bias)
        assert DT_MIN * 0.999 <= dt.min() and dt.max() <= DT_MAX * 1.001
        assert dt.max() / dt.min() > 5  # spread, not a constant
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, N + 1).expand(E, N))
    assert mamba.dt_proj.weight.abs().max() <= R**-0.5
    A = mamba2.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and A.std() > 2
    assert (mamba.D == 1).all() and (mamba2.D == 1).all()
    assert mamba.dt_rank == math.ceil(D / 16)


def test_mamba_written_out():
    """The block step by step, with a plain loop for the recurrence (paper 2312.00752, figure 3)."""
    mamba, x = Mamba(D, N).double(), torch.randn(2, 7, D).double()
    u, z = (x @ mamba.in_proj.weight.T).split(E, -1)
    u = F.silu(F.conv1d(u.mT, mamba.conv1d.weight, mamba.conv1d.bias, padding=3, groups=E)[..., :7].mT)
    dt, B, C = (u @ mamba.x_proj.weight.T).split([R, N, N], -1)
    delta = F.softplus(dt @ mamba.dt_proj.weight.T + mamba.dt_proj.bias)
    h, outputs = torch.zeros(2, E, N).double(), []
    for t in range(7):
        h = torch.exp(delta[:, t, :, None] * -mamba.A_log.exp()) * h
        h = h + delta[:, t, :, None] * u[:, t, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1) + mamba.D * u[:, t])
    expected = (torch.stack(outputs, 1) * F.silu(z)) @ mamba.out_proj.weight.T
    assert torch.allclose(mamba(x), expected, atol=1e-6)


def test_mamba2_written_out():
    """in_proj gives z, x, B, C, dt in this order; one decay per head (paper 2405.21060, figure 6)."""
    P, H = 16, 4
    mamba2, x = Mamba2(D, N, head_dim=P).double(), torch.randn(2, 7, D).double()
    z, xBC, dt = (x @ mamba2.in_proj.weight.T).split([E, E + 2 * N, H], -1)
    xBC = F.conv1d(xBC.mT, mamba2.conv1d.weight, mamba2.conv1d.bias, padding=3, groups=E + 2 * N)[..., :7].mT
    u, B, C = F.silu(xBC).split([E, N, N], -1)
    u, dt = u.unflatten(-1, (H, P)), F.softplus(dt + mamba2.dt_bias)
    h, outputs = torch.zeros(2, H, P, N).double(), []
    for t in range(7):
        h = torch.exp(dt[:, t] * -mamba2.A_log.exp())[..., None, None] * h
        h = h + dt[:, t, :, None, None] * u[:, t, :, :, None] * B[:, t, None, None, :]
        outputs.append((h * C[:, t, None, None, :]).sum(-1) + mamba2.D[:, None] * u[:, t])
    gated = torch.stack(outputs, 1).flatten(-2) * F.silu(z)
    normed = gated / gated.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt() * mamba2.norm.weight
    assert torch.allclose(mamba2(x), normed @ mamba2.out_proj.weight.T, atol=1e-6)


def test_gated_norm_written_out():
    norm, x, z = GatedRMSNorm(6), torch.randn(3, 6), torch.randn(3, 6)
    gated = x * F.silu(z)
    assert torch.allclose(norm(x, z), gated / gated.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt(), atol=1e-6)


def mixers() -> list[object]:
    return [
        pytest.param(lambda backend: Mamba(D, N, backend=backend), id="mamba"),
        pytest.param(lambda backend: Mamba2(D, N, head_dim=16, backend=backend), id="mamba2"),
    ]


@pytest.mark.parametrize("make", mixers())
def test_backends_agree_and_every_parameter_learns(make: Callable[[str], nn.Module]):
    x = torch.randn(3, 21, D)
    results: list[tuple[Tensor, list[Tensor]]] = []
    for backend in ("reference", "torch"):
        torch.manual_seed(0)
        mixer = make(backend)
        y = mixer(x)
        results.append((y, list(torch.autograd.grad(y.square().sum(), list(mixer.parameters())))))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-3 * float(a.abs().max()))


@pytest.mark.parametrize("make", mixers())
def test_the_future_does_not_reach_the_past(make: Callable[[str], nn.Module]):
    mixer, x = make("torch"), torch.randn(2, 20, D)
    changed = x.clone()
    changed[:, 12:] = torch.randn(2, 8, D)
    before, after = mixer(x), mixer(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


@pytest.mark.parametrize("mixer", [Mamba, Mamba2])
def test_parity_with_mamba_ssm(mixer: type[Mamba] | type[Mamba2]):
    """A state dict of mamba_ssm gives the same output here (on CUDA, where it is installed)."""
    theirs = pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed")
    if not torch.cuda.is_available():
        pytest.skip("mamba_ssm needs CUDA")
    options = {"d_state": 16, "expand": 2} | ({"headdim": 64} if mixer is Mamba2 else {})
    original = getattr(theirs, mixer.__name__)(64, **options).cuda()
    ours = mixer(64, d_state=16).cuda()
    ours.load_state_dict(original.state_dict())
    x = torch.randn(4, 50, 64, device="cuda")
    assert torch.allclose(ours(x), original(x), atol=1e-4)


@pytest.mark.parametrize(("mamba", "entry"), [(True, "forward"), (False, "forward"), (False, "last")])
def test_one_graph_in_training_and_in_use(mamba: bool, entry: str):
    """torch.compile without a break, of any batch size, and of any length but for S6, which unrolls it."""
    mixer = Mamba(D, N, backend="torch") if mamba else Mamba2(D, N, head_dim=16, backend="torch")
    plain = getattr(mixer, entry)
    torch.compiler.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 2), (3, 2)) if mamba else ((2, 3), (3, 5)):
        x = torch.randn(batch, length, D, requires_grad=True)
        lengths = torch.randint(1, length + 1, (batch,))
        inputs = (x, ItemBatch(torch.zeros(batch, length), lengths))
        results = [(y, *torch.autograd.grad(y.sum(), x)) for y in (plain(*inputs), compiled(*inputs))]
        for expected, found in zip(*results, strict=True):
            assert torch.allclose(found, expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(compiled(*inputs), plain(*inputs), atol=1e-6)


def entries(mixer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each way into a mixer answers for the last position."""
    y, _ = mixer.advance(x)
    _, state = mixer.advance(x[:, :-1])
    answers = {"forward": y[:, -1], "step": mixer.step(x[:, -1], state)[0]}
    lengths = torch.full((len(x),), x.shape[1])
    return answers | {"last": mixer.last(x, ItemBatch(torch.zeros(x.shape[:2]), lengths))}


@pytest.mark.parametrize("make", mixers())
def test_hooks_on_the_projections_run(make: Callable[[str], nn.Module]):
    """Whichever way in; one that scales an input by two is as one that scales the weight."""
    mixer, x = make("torch"), torch.randn(2, 5, D)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        if (projection := getattr(mixer, name, None)) is None:
            continue
        handle = projection.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        hooked = entries(mixer, x)
        handle.remove()
        with torch.no_grad():
            projection.weight.mul_(2)
        for way, expected in entries(mixer, x).items():
            assert torch.allclose(hooked[way], expected, atol=1e-6), (name, way)


@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning", "ignore:.*TypedStorage.*:UserWarning")
@pytest.mark.parametrize("make", mixers())
def test_quantised_projections(make: Callable[[str], nn.Module]):
    """int8 weights in every way in, near to those in float32."""
    mixer, x = make("torch").eval(), torch.randn(2, 5, D)
    small = torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear}, dtype=torch.qint8)
    assert type(small.in_proj) is not type(mixer.in_proj)
    with torch.no_grad():
        expected, found = entries(mixer, x), entries(small, x)
    for way, y in expected.items():
        assert 0 < (found[way] - y).abs().max() < 0.05 * y.abs().max(), way


@pytest.mark.parametrize(
    "make", [lambda: Mamba(4, 2), lambda: Mamba2(4, 2, head_dim=4)], ids=["mamba", "mamba2"]
)
def test_a_mixer_in_float64_is_exact(make: Callable[[], nn.Module]):
    """Every gradient against differences, the decay's parameter included."""
    mixer = make().double()
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-8)
