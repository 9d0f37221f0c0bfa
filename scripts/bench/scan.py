"""The operators against their rivals: forward, forward and backward, peak memory.

    python scripts/bench/scan.py                # CPU or GPU, whichever is there
    python scripts/bench/scan.py --threads=2 --lengths 200

Every rival computes the same function, which is checked before anything is timed: outputs and
gradients against the reference. SSD computes another one (a decay per head, not per channel and
state) at the same sizes. `mixer` rows time whole Mamba mixers, ours and the slow path of
transformers.
"""

import argparse
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    measure_peak_mib,
    plot_benchmark_series,
    relative_error,
    run_in_child_process,
    set_threads_and_device,
    write_benchmark_results,
)
from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.mamba import Mamba
from m2rec.ops import BACKENDS, resolve_backend, selective_scan, ssd

# Positions in a batch: enough to fill the machine, whatever the length of a sequence.
POSITIONS = {"cpu": 64 * 200, "cuda": 2048 * 200}
TOLERANCE = 1e-4
HEAD_DIM = 64
# transformers' slow path: its backward pass makes a whole tensor of zeros for each step's slice, so
# time grows with the square of L; longer than this it is not timed
LONGEST_TRANSFORMERS = 200
Call = Callable[..., Tensor]


def run_mambapy_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """selective_scan on the parallel scan of mambapy, which takes all decays and inputs at once."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + delta_bias)
    decays = torch.exp(delta[..., None] * A)
    inputs = (delta * u)[..., None] * B[:, :, None]
    y = (pscan(decays, inputs) @ C[..., None])[..., 0] + D * u
    return y * F.silu(z)


@cache
def find_unavailable_scans(device: str) -> dict[str, str]:
    """The rivals that can't run here, and why."""
    found = {}
    for backend in BACKENDS:
        try:
            resolve_backend(backend, device)
        except ValueError as error:
            found[backend] = str(error)
    if device == "cpu":
        found["triton"] = "its interpreter is no rival in time"
    if not find_spec("mambapy"):
        found["mambapy"] = "not installed: pip install mambapy"
    return found


def build_scans(device: str) -> dict[str, Call]:
    """The selective scans that can run here, the reference first."""
    found: dict[str, Call] = {
        backend: partial(selective_scan, delta_softplus=True, backend=backend) for backend in BACKENDS
    }
    found["mambapy"] = run_mambapy_scan
    return {name: call for name, call in found.items() if name not in find_unavailable_scans(device)}


def make_scan_inputs(batch: int, length: int, channels: int, states: int, device: str) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias, as a trained mixer might give them."""
    torch.manual_seed(0)
    u, delta, z = (torch.randn(batch, length, channels, device=device) for _ in range(3))
    B, C = (torch.randn(batch, length, states, device=device) for _ in range(2))
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    D, bias = torch.ones(channels, device=device), torch.full((channels,), -3.0, device=device)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]


def make_ssd_inputs(batch: int, length: int, channels: int, states: int, device: str) -> list[Tensor]:
    """x, dt, A, B, C, D, dt_bias at the sizes of the scan."""
    torch.manual_seed(0)
    heads = max(1, channels // HEAD_DIM)
    x = torch.randn(batch, length, heads, channels // heads, device=device)
    dt = torch.randn(batch, length, heads, device=device)
    B, C = (torch.randn(batch, length, states, device=device) for _ in range(2))
    A = -torch.linspace(1, 16, heads, device=device)
    D, bias = torch.ones(heads, device=device), torch.full((heads,), -3.0, device=device)
    return [t.requires_grad_() for t in (x, dt, A, B, C, D, bias)]


def build_mixer_calls(channels: int, states: int, length: int, device: str) -> dict[str, Call]:
    """Whole Mamba mixers with the same weights: ours, and the slow path of transformers."""
    torch.manual_seed(0)
    ours = Mamba(channels // 2, states).to(device)
    found: dict[str, Call] = {"mixer: m2rec": ours}
    if find_spec("transformers") and length <= LONGEST_TRANSFORMERS:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(hidden_size=channels // 2, state_size=states, expand=2, use_mambapy=False)
        theirs = MambaMixer(config, layer_idx=0).to(device)
        theirs.load_state_dict(ours.state_dict())
        slow = getattr(theirs, "_slow_forward", None) or theirs.slow_forward  # renamed in transformers 5
        found["mixer: transformers"] = slow
    return found


def run_forward(call: Call, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        call(*inputs)


def run_forward_and_backward(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    y = call(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, _draw_output_gradient(y.shape, y.device))]


@cache
def _draw_output_gradient(shape: torch.Size, device: torch.device) -> Tensor:
    """The gradient that comes into backward."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)


def build_scan_candidates(
    batch: int, length: int, channels: int, states: int, device: str
) -> dict[str, tuple[Call, list[Tensor]]]:
    """Name -> call and inputs."""
    inputs = make_scan_inputs(batch, length, channels, states, device)
    found = {name: (call, inputs) for name, call in build_scans(device).items()}
    dual = make_ssd_inputs(batch, length, channels, states, device)
    found["ssd: torch"] = (partial(ssd, dt_softplus=True, backend="torch"), dual)
    if "mamba_ssm" in found:
        found["ssd: mamba_ssm"] = (partial(ssd, dt_softplus=True, backend="mamba_ssm"), dual)
    x = torch.randn(batch, length, channels // 2, device=device).requires_grad_()
    found |= {name: (call, [x]) for name, call in build_mixer_calls(channels, states, length, device).items()}
    return found


def check_against_reference(found: dict[str, tuple[Call, list[Tensor]]]) -> None:
    """Stop unless every rival gives what the reference gives, gradients included; drop what has no room."""
    leaders = {"": "reference", "ssd": "ssd: torch", "mixer": "mixer: m2rec"}
    expected = {kind: run_forward_and_backward(*found[name]) for kind, name in leaders.items()}
    for name, (call, inputs) in list(found.items()):
        kind = name.split(":")[0] if ":" in name else ""
        try:
            actual = run_forward_and_backward(call, inputs)
        except torch.OutOfMemoryError:
            print(f"without {name}: out of memory")
            del found[name]
            continue
        worst = max(relative_error(a, e) for a, e in zip(actual, expected[kind], strict=True))
        if worst > TOLERANCE:
            raise SystemExit(f"{name} is not equal to {leaders[kind]}: relative error {worst:.1e}")


def measure_scan_memory(name: str, sizes: tuple[int, int, int, int], device: str, threads: int) -> float:
    """Peak of forward and backward in MiB."""
    set_threads_and_device(device, threads)
    small = build_scan_candidates(1, 8, sizes[2], sizes[3], device)
    run_forward_and_backward(*small[name])  # libraries are loaded and set up before
    call, inputs = build_scan_candidates(*sizes, device)[name]
    return measure_peak_mib(lambda: run_forward_and_backward(call, inputs), device)


def measure_scans(args: argparse.Namespace, length: int) -> list[Row]:
    """All rivals at one length."""
    batch = max(1, round(args.positions / length))
    sizes = (batch, length, args.channels, args.states)
    found = build_scan_candidates(*sizes, args.device)
    try:
        check_against_reference(found)
    except torch.OutOfMemoryError:
        print(f"without L = {length}: out of memory; give fewer --positions")
        return []
    short = {name: partial(run_forward, *pair) for name, pair in found.items()}
    whole = {name: partial(run_forward_and_backward, *pair) for name, pair in found.items()}
    seconds = (
        measure_median_seconds(short, args.repeats, args.device),
        measure_median_seconds(whole, args.repeats, args.device),
    )
    rows = []
    for name in [name for name in found if name in seconds[0] and name in seconds[1]]:  # what has room
        own = "mixer: m2rec" if name.startswith("mixer") else args.own
        row: Row = {"L": length, "B": batch, "what": name, "forward ms": seconds[0][name] * 1e3}
        row["forward + backward ms"] = seconds[1][name] * 1e3
        row[f"times the time of {args.own}"] = seconds[1][name] / seconds[1][own]
        if not args.no_memory:
            row["peak MiB"] = run_in_child_process(
                measure_scan_memory, name, sizes, args.device, args.threads
            )
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = build_benchmark_parser(__doc__, "bench_scan")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1000, 4000])
    parser.add_argument("--positions", type=int, help="positions in a batch")
    parser.add_argument("--channels", type=int, default=128, help="E")
    parser.add_argument("--states", type=int, default=32, help="N")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    args = parser.parse_args()
    set_threads_and_device(args.device, args.threads)
    args.positions = args.positions or POSITIONS[args.device.split(":")[0]]
    args.own = resolve_backend("auto", args.device).name
    for name, reason in find_unavailable_scans(args.device).items():
        print(f"without {name}: {reason}")
    rows = [row for length in args.lengths for row in measure_scans(args, length)]
    note = f"E = {args.channels}, N = {args.states}, float32; mixer rows are relative to our mixer"
    write_benchmark_results(args, rows, note)
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = series.setdefault(row["what"], ([], []))
        xs.append(row["L"])
        ys.append(row["forward + backward ms"])
    plot_benchmark_series(
        args, series, "sequence length L", f"ms per {args.positions:,} positions, forward + backward"
    )


if __name__ == "__main__":
    main()
