"""What a training would need and cost on a GPU, in words: what `hafs plan` prints."""

import dataclasses
from collections import defaultdict

from hafs_jax.config import TrainConfig
from hafs_jax.fast.plan import check_kernels, resolve_products
from hafs_jax.store.manifest import DISK_DTYPES
from hafs_jax.targets.cost import Branch, Kernel, Loop, Part, schedule
from hafs_jax.targets.deviceless import NoCompiler, arguments_on, compiled_for, devices_of
from hafs_jax.targets.gpus import Gpu, total
from hafs_jax.targets.hlo import parse
from hafs_jax.training.budget import estimate

_MOST_LINES = 12


def described(
    config: TrainConfig, on: Gpu, d_model: int, d_out: int | None = None, devices: int = 1, dtype: str = "bfloat16"
) -> list[str]:
    """What a step of the config needs and costs on each of `devices` GPUs, in lines."""
    config = _for_target(config, d_model, on)
    check_kernels(config, on.machine)
    try:
        places = devices_of(on, devices)
    except NoCompiler as error:
        return [str(error), f"without it, by an estimate: {_estimate(config, d_model, d_out, devices, dtype)}"]
    arguments = arguments_on(places, config, d_model, d_out, dtype=dtype)
    compiled = compiled_for(places, arguments)
    memory = compiled.memory_analysis()
    needed = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
    found = schedule(parse(compiled.as_text()), on.cache)
    whole = total(found.parts, on)
    rows = config.batch_size / whole.seconds
    several = f" of {devices}" if devices > 1 else ""
    lines = [
        f"{config.sae.architecture} D={d_model} F={config.sae.F} k={config.sae.k}, {config.batch_size:,} rows a step, "
        f"{config.sae.compute_dtype}, {config.products} products; compiled for {on.name}{several}, no device was asked",
        f"memory of one device: {needed:.1f} of {on.memory / 1e9:.0f} GB (state and rows "
        f"{memory.argument_size_in_bytes / 1e9:.1f}, temporary {memory.temp_size_in_bytes / 1e9:.1f})",
        f"a step by roofline: {1e3 * whole.seconds:.1f} ms, so at most {rows:,.0f} rows/s; it moves "
        f"{whole.bytes / 1e9:.1f} GB, multiplies {whole.flops / 1e12:.2f} TFLOP, in {whole.launches:,} kernels",
        "where its time goes:",
        *_largest(found.parts, on),
    ]
    return lines + _beside(found.parts, on)


def _for_target(config: TrainConfig, d_model: int, on: Gpu) -> TrainConfig:
    """The config with what a training on the GPU would fill in."""
    if config.sae.n_latents is None:
        sae = dataclasses.replace(config.sae, n_latents=config.sae.expansion * d_model)
        config = dataclasses.replace(config, sae=sae)
    return dataclasses.replace(config, products=resolve_products(config, on.machine))


def _estimate(config: TrainConfig, d_model: int, d_out: int | None, devices: int, dtype: str) -> str:
    """The estimated memory of one device, in words."""
    widths = [d_model] if d_out is None else [d_model, d_out]
    row_bytes = sum(width * DISK_DTYPES[dtype].itemsize for width in widths)
    return str(estimate(config, d_model, d_out, row_bytes, devices=devices, platform="gpu"))


def _largest(parts: tuple[Part, ...], on: Gpu) -> list[str]:
    """The kernels that take most of the time, those of one origin together."""
    seconds: dict[str, float] = defaultdict(float)
    moved: dict[str, int] = defaultdict(int)
    flops: dict[str, int] = defaultdict(int)
    for kernel, times in _counted(parts, on):
        name = _origin(kernel)
        seconds[name] += times * on.seconds(kernel)
        moved[name] += times * kernel.bytes
        flops[name] += times * kernel.flops
    largest = sorted(seconds, key=lambda name: -seconds[name])
    lines = [
        f"  {1e3 * seconds[name]:7.2f} ms  {moved[name] / 1e9:6.2f} GB  {flops[name] / 1e12:5.2f} TFLOP  {name}"
        for name in largest[:_MOST_LINES]
    ]
    rest = sum(seconds[name] for name in largest[_MOST_LINES:])
    return [*lines, f"  {1e3 * rest:7.2f} ms  all else"]


def _counted(parts: tuple[Part, ...], on: Gpu, times: int = 1) -> list[tuple[Kernel, int]]:
    """The kernels that `total` counts, and how often."""
    found: list[tuple[Kernel, int]] = []
    for part in parts:
        if isinstance(part, Kernel):
            found.append((part, times))
        elif isinstance(part, Branch):
            found += _counted(min(part.each, key=lambda each: total(each, on).seconds), on, times)
        elif isinstance(part, Loop) and part.trips is not None:
            found += _counted(part.body, on, times * part.trips)
    return found


def _beside(parts: tuple[Part, ...], on: Gpu) -> list[str]:
    """What may come beside: the dearer alternatives of conditionals, and loops whose trips depend on the data."""
    lines = []
    for part in parts:
        if isinstance(part, Branch):
            costs = sorted(1e3 * total(each, on).seconds for each in part.each)
            if costs[-1] - costs[0] > 0.01:
                more = ", ".join(f"{cost - costs[0]:.2f}" for cost in costs[1:])
                lines.append(f"  in some steps {more} ms more: {_short(part.source)}")
        elif isinstance(part, Loop) and part.trips is None:
            lines.append(f"  {1e3 * total(part.body, on).seconds:.2f} ms at each turn of {_short(part.source)}")
        elif isinstance(part, Loop):
            lines += _beside(part.body, on)
    return ["beside it:", *lines] if lines and parts else lines


def _origin(kernel: Kernel) -> str:
    kind = "product" if kernel.flops else kernel.opcode
    return f"{kind}: {_short(kernel.source)}" if kernel.source else f"{kind}: {kernel.name}"


def _short(source: str) -> str:
    """The end of a source, without what every operation of a step has in common."""
    common = ("jit(train_steps)", "while", "body", "closed_call")
    return "/".join([part for part in source.split("/") if part not in common][-4:]) or source
