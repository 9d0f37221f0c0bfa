"""The operators against their baselines: forward, forward and backward, peak memory.

    python scripts/bench/scan.py                # CPU or GPU, whichever is there
    python scripts/bench/scan.py --threads=2 --lengths 200

Every baseline computes the same function, which is checked before anything is timed: outputs and
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
    add_length_arguments,
    build_benchmark_parser,
    check_equal,
    collect_series,
    compute_batch_size,
    measure_median_seconds,
    measure_peak_mib,
    parse_benchmark_arguments,
    plot_benchmark_series,
    print_row,
    run_in_child_process,
    write_benchmark_results,
)
from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.mamba import Mamba
from m2rec.ops import BACKENDS, resolve_backend, selective_scan, ssd

TOLERANCE = 1e-4
HEAD_DIM = 64
TIME = "forward + backward ms"
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
    """The scans that can't run here, and why."""
    found = {}
    for backend in BACKENDS:
        try:
            resolve_backend(backend, device)
        except ValueError as error:
            found[backend] = str(error)
    if device == "cpu":
        found["triton"] = "its interpreter is too slow to be compared"
    if not find_spec("mambapy"):
        found["mambapy"] = "not installed: pip install mambapy"
    return found


def build_scans(device: str) -> dict[str, Call]:
    """The selective scans that can run here, the reference first."""
    unavailable = find_unavailable_scans(device)
    scans: dict[str, Call] = {}
    for backend in BACKENDS:
        if backend not in unavailable:
            scans[backend] = partial(selective_scan, delta_softplus=True, backend=backend)
    if "mambapy" not in unavailable:
        scans["mambapy"] = run_mambapy_scan
    return scans


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
    """Stop unless every scan gives what its reference gives, gradients included; drop what lacks memory."""
    references = {"": "reference", "ssd": "ssd: torch", "mixer": "mixer: m2rec"}
    expected = {}
    for kind, name in references.items():
        expected[kind] = run_forward_and_backward(*found[name])
    for name, pair in list(found.items()):
        kind = name.split(":")[0] if ":" in name else ""
        try:
            actual = run_forward_and_backward(*pair)
        except torch.OutOfMemoryError:
            print(f"without {name}: out of memory")
            del found[name]
            continue
        check_equal(f"{name} and {references[kind]}", actual, expected[kind], TOLERANCE)


def measure_scan_memory(name: str, sizes: tuple[int, int, int, int], device: str) -> float:
    """Peak of forward and backward in MiB."""
    small = build_scan_candidates(1, 8, *sizes[2:], device)
    run_forward_and_backward(*small[name])  # libraries are loaded and set up before
    pair = build_scan_candidates(*sizes, device)[name]
    return measure_peak_mib(lambda: run_forward_and_backward(*pair), device)


def measure_scans(args: argparse.Namespace, length: int) -> list[Row]:
    """All scans at one length."""
    batch = compute_batch_size(args, length)
    sizes = (batch, length, args.channels, args.states)
    found = build_scan_candidates(*sizes, args.device)
    try:
        check_against_reference(found)
    except torch.OutOfMemoryError:
        print(f"without L = {length}: out of memory; give fewer --positions")
        return []
    whole = {name: partial(run_forward_and_backward, *pair) for name, pair in found.items()}
    seconds = measure_median_seconds(whole, args.repeats, args.device)
    short = {name: partial(run_forward, *found[name]) for name in seconds}
    own = resolve_backend("auto", args.device).name
    rows = []
    for name, forward in measure_median_seconds(short, args.repeats, args.device).items():
        baseline = "mixer: m2rec" if name.startswith("mixer") else own
        row: Row = {"L": length, "B": batch, "what": name, "forward ms": forward * 1e3}
        row[TIME] = seconds[name] * 1e3
        row[f"times the time of {own}"] = seconds[name] / seconds[baseline]
        if not args.no_memory:
            row["peak MiB"] = run_in_child_process(args, measure_scan_memory, name, sizes)
        rows.append(print_row(row))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_scan")
    add_length_arguments(parser)
    parser.add_argument("--channels", type=int, default=128, help="E")
    parser.add_argument("--states", type=int, default=32, help="N")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    args = parse_benchmark_arguments(parser)
    for name, reason in find_unavailable_scans(args.device).items():
        print(f"without {name}: {reason}")
    rows = []
    for length in args.lengths:
        rows += measure_scans(args, length)
    note = f"E = {args.channels}, N = {args.states}, float32; mixer rows are relative to our mixer"
    write_benchmark_results(args, rows, note)
    series = collect_series(rows, "{what}", "L", TIME)
    plot_benchmark_series(args, series, "sequence length L", f"ms per batch of about equal size, {TIME[:-3]}")


if __name__ == "__main__":
    main()
