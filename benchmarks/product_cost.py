"""Cost of one exact curvature product in gradients, by mode, with plain double backward beside it.

    python benchmarks/product_cost.py runs/smollm2 --batch-size 2 --sequence-length 128
    python benchmarks/product_cost.py runs/smollm2 --batch-size 8 --micro-batches 4 --zero-stage 3

One process, world size 1, float32. With several micro-batches also what a pass over all of them costs beside a pass
for each, in time and in elements that collectives deliver. Methods alternate within each repetition, so that a slow
minute hits all of them; the medians are printed as ratios to the gradient of the same run. Prints one JSON line at the
end.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from distributed_unlearn.config import ModelConfig  # noqa: E402
from distributed_unlearn.curvature.linearisation import Linearisation  # noqa: E402
from distributed_unlearn.curvature.trace import LossShare  # noqa: E402
from distributed_unlearn.engine.communicator import RankSpec, connect, open_store  # noqa: E402
from distributed_unlearn.engine.model import OpenedModel, open_model  # noqa: E402
from distributed_unlearn.engine.partitions import prepare_deepspeed  # noqa: E402
from distributed_unlearn.engine.worker import quiet_libraries  # noqa: E402
from distributed_unlearn.provenance import package_versions  # noqa: E402


def methods(opened: OpenedModel, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name -> one timed call."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    master = opened.weights.master
    v = opened.space.random_normal(master, 1)
    out, scrap = torch.zeros_like(master), torch.zeros_like(master)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:])

    def make(**flags: object) -> Linearisation:
        return Linearisation(opened.segmented, opened.store, [LossShare(inputs, loss)], **flags)  # type: ignore[arg-type]

    cached, cached_gn = make(cached=True), make(cached=True, product="gauss_newton")
    cached.gradient(scrap)
    cached_gn.gradient(scrap)
    parameters = list(opened.model.parameters())
    tangents = [torch.randn_like(parameter) for parameter in parameters]

    def double_backward() -> object:
        value = loss(opened.model(**inputs, use_cache=False).logits)
        first = torch.autograd.grad(value, parameters, create_graph=True)
        return torch.autograd.grad(first, parameters, tangents)

    return {
        "gradient": lambda: make(keep_forward=True).gradient(out),
        "gradient, segments recomputed": lambda: make().gradient(out),
        "double backward, whole model": double_backward,
        "Hv recompute (gradient included)": lambda: make().product(v, out, scrap),
        "Hv cached": lambda: cached.product(v, out),
        "Gv recompute (gradient included)": lambda: make(product="gauss_newton").product(v, out, scrap),
        "Gv cached": lambda: cached_gn.product(v, out),
    }


def micro_batch_methods(opened: OpenedModel, ids: torch.Tensor, count: int) -> dict[str, Callable[[], object]]:
    """As `methods`, on the same records in `count` micro-batches: in one pass, and in a pass for each of them."""
    master = opened.weights.master
    v = opened.space.random_normal(master, 1)
    out = torch.zeros_like(master)

    def share_of(part: torch.Tensor) -> LossShare:
        def loss(logits: torch.Tensor) -> torch.Tensor:
            targets = part[:, 1:]
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, reduction="sum")
            return losses / ids[:, 1:].numel()

        return LossShare({"input_ids": part, "attention_mask": torch.ones_like(part)}, loss)

    shares = [share_of(part) for part in ids.chunk(count)]
    ways = {"in one pass": [shares], "in a pass each": [[share] for share in shares]}

    def make(groups: list[list[LossShare]], **flags: bool) -> list[Linearisation]:
        return [Linearisation(opened.segmented, opened.store, group, **flags) for group in groups]  # type: ignore[arg-type]

    calls: dict[str, Callable[[], object]] = {}
    for way, groups in ways.items():
        cached = make(groups, cached=True)
        for linearisation in cached:
            linearisation.gradient(torch.zeros_like(out))
        calls[f"loss, {way}"] = lambda groups=groups: [each.loss() for each in make(groups)]
        calls[f"gradient, {way}"] = lambda groups=groups: [each.gradient(out) for each in make(groups)]
        calls[f"Hv recompute, {way}"] = lambda groups=groups: [each.product(v, out) for each in make(groups)]
        calls[f"Hv cached, {way}"] = lambda cached=cached: [each.product(v, out) for each in cached]
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=1, help="cut the batch into so many as well")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    gpu = torch.cuda.is_available()
    store, port = open_store("127.0.0.1", 60)
    communicator = connect(RankSpec(0, 1, 0, 1), "127.0.0.1", port, store, 60, gpu)
    prepare_deepspeed(gpu)
    opened = open_model(ModelConfig(path=str(arguments.model)), torch.float32, arguments.zero_stage, communicator)
    shape = (arguments.batch_size, arguments.sequence_length)
    ids = torch.randint(3, int(opened.config.vocab_size), shape, device=communicator.device)
    # At stage 3 the model by itself has no weights to run on.
    calls = {n: call for n, call in methods(opened, ids).items() if arguments.zero_stage < 3 or "whole model" not in n}
    if arguments.micro_batches > 1:
        calls |= micro_batch_methods(opened, ids, arguments.micro_batches)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    elements: dict[str, int] = {}
    for _ in range(arguments.repetitions):
        for name, call in calls.items():
            before = communicator.num_elements_moved
            started = time.process_time() if not gpu else time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            seconds[name].append((time.process_time() if not gpu else time.perf_counter()) - started)
            elements[name] = communicator.num_elements_moved - before
    base = statistics.median(seconds["gradient"])
    ratios = {name: statistics.median(values) / base for name, values in seconds.items()}
    for name, ratio in ratios.items():
        moved = elements[name] / opened.layout.num_trainable
        print(f"{name:36s} {ratio:5.2f} gradients   {moved:6.2f} elements moved a parameter")
    hardware = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {arguments.threads} thread(s)"
    summary = {"gradient_seconds": base, "ratios": ratios, "hardware": hardware, "versions": package_versions()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
