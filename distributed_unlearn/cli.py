"""The command line: `distributed-unlearn run | compare | report | plan | check | evaluate | submit | demo | ...`.

Exit codes: 0 done; 1 a bug of ours (with traceback); 2 wrong usage; 3 configuration; 4 data; 5 model;
6 resources; 7 numerics; 8 a worker failed; 9 a check failed; 10 done and written, but what was measured is not that
everything is forgotten and the rest kept (0 with `run --allow-incomplete`); 11 the ledger; 12 a request; 13 the lease
is another's; 14 a gate rolled the round back; 15 a submitted job was stopped; 129 hung up; 130 interrupted; 143
terminated.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import get_args

from rich.console import Console

from distributed_unlearn.commands.service_arguments import (
    SERVICE_COMMANDS,
    add_service_commands,
    require_service_extra,
    run_service_command,
)
from distributed_unlearn.commands.submit import add_submit, run_submit
from distributed_unlearn.config import ClusterConfig, ModelTask, load_evaluation, load_job, parse_cluster
from distributed_unlearn.errors import ConfigError, UserError, WorkerError
from distributed_unlearn.files import unwritable
from distributed_unlearn.version import __version__

INCOMPLETE = 10
"""Exit code of a run that ended as it should, whose verdict is not that everything is forgotten and the rest kept."""


def _at_least(option: str, minimum: int) -> Callable[[str], int]:
    """Reads a whole number; one below `minimum` is refused as a job file's value would be, before anything starts."""

    def integer(text: str) -> int:
        if (number := int(text)) < minimum:
            raise ConfigError(f"{option} {number}", f"at least {minimum}", f"give {option} a larger number")
        return number

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distributed-unlearn", description="Make a Hugging Face checkpoint forget records, and prove it."
    )
    parser.add_argument("--version", action="version", version=f"distributed-unlearn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "run a job: unlearn, or train where it has a train section"),
        ("plan", "validate a job and estimate what it needs, without touching the weights"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", type=Path, help="job file (YAML)")
        command.add_argument("overrides", nargs="*", help="section.key=value")
        if name == "run":
            command.add_argument(
                "--allow-incomplete",
                action="store_true",
                help=f"end with exit code 0, not {INCOMPLETE}, where not everything is forgotten or the rest not kept",
            )
    add_submit(commands)
    _add_evaluate(commands)
    _add_comparison(commands)
    _add_demo(commands)
    _add_check(commands)
    add_service_commands(commands)
    return parser


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser("evaluate", help="measure what a checkpoint still knows, whoever made it")
    evaluate.add_argument("evaluation", type=Path, help="evaluation file (YAML)")
    evaluate.add_argument("overrides", nargs="*", help="section.key=value")


def _add_comparison(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = commands.add_parser("compare", help="run methods and seeds on one base job and compare them")
    compare.add_argument("comparison", type=Path, help="file of the comparison (YAML)")
    compare.add_argument("overrides", nargs="*", help="key=value, e.g. seeds=[0] or job.cluster.num_workers=2")
    report = commands.add_parser("report", help="figures of runs, comparisons and spectra on one page, and as data")
    report.add_argument("folders", nargs="+", help="output folders of runs, of compare or of check spectrum")
    report.add_argument("--output", default=None, help="folder to write; default: `report` in the first folder")
    report.add_argument("--overwrite", action="store_true", help="replace the folder given by --output")


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser("demo", help="fictitious people: train, forget three of them, compare")
    demo.add_argument("--output", type=Path, help="default: runs/demo, or runs/demo_service")
    demo.add_argument("--service", action="store_true", help="the service instead: requests, rounds, certificates")
    demo.add_argument("--seed", type=_at_least("--seed", 0), default=0)
    demo.add_argument("--num-workers", type=_at_least("--num-workers", 1), default=2)
    demo.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=3)
    demo.add_argument("--address", default=None, help="Ray address; default: the surrounding job's, else a local Ray")
    demo.add_argument(
        "--use-gpu",
        choices=("auto", "always", "never"),
        default="auto",
        help="as cluster.use_gpu: a GPU for every worker",
    )
    demo.add_argument("--short", action="store_true", help="a much smaller run of the same path (about a minute)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in the output folder")


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = commands.add_parser("check", help="check numerics").add_subparsers(dest="check", required=True)
    curvature = check.add_parser("curvature", help="compare sharded products with an unsharded float64 reference")
    curvature.add_argument("--model", required=True, help="checkpoint folder or hub name")
    curvature.add_argument("--task", choices=get_args(ModelTask), default="causal_lm")
    curvature.add_argument("--adapter", default=None, help="a LoRA adapter's folder, or `lora`: a new one")
    text = "default: 2; 1 in this process"
    curvature.add_argument("--num-workers", type=_at_least("--num-workers", 1), default=None, help=text)
    curvature.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=3)
    curvature.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    curvature.add_argument("--mode", choices=("recompute", "cached"), default="recompute")
    curvature.add_argument("--product", choices=("hessian", "gauss_newton"), default="hessian")
    references = ("auto", "double_backward", "central_difference")
    curvature.add_argument("--reference", choices=references, default="auto")
    curvature.add_argument("--batch-size", type=_at_least("--batch-size", 1), default=4)
    curvature.add_argument("--sequence-length", type=_at_least("--sequence-length", 4), default=32)
    curvature.add_argument("--seed", type=_at_least("--seed", 0), default=0)
    curvature.add_argument("--backend", choices=("ray", "in_process"), default="ray")
    spectrum = check.add_parser("spectrum", help="eigenvalues of the retain Hessian and its numerical rank")
    spectrum.add_argument("job", type=Path, help="job file: its model, or with --epochs its training")
    spectrum.add_argument("overrides", nargs="*", help="section.key=value; the result is written into `output`")
    spectrum.add_argument("--epochs", default="", help="of a training job, e.g. 0,1,5; 0 is the model before it")
    spectrum.add_argument("--max-records", type=_at_least("--max-records", 1), default=None)
    spectrum.add_argument("--exact-up-to", type=_at_least("--exact-up-to", 0), default=5000, help="parameters")
    spectrum.add_argument("--probes", type=_at_least("--probes", 1), default=4, help="random starts of the quadrature")
    spectrum.add_argument("--lanczos-steps", type=_at_least("--lanczos-steps", 1), default=40)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may also stand behind options, where argparse alone would not know them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a run in order: workers are ended and staging folders vanish."""


def _stop(number: int, frame: FrameType | None) -> None:
    for name in _STOPS:
        signal.signal(name, _ask_for_patience)  # a second one would cut the clean-up short
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _ask_for_patience(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ending: wait until the workers have ended\n")


def _ignore_stops() -> None:
    """Once a signal has been obeyed: while Python shuts down it puts default handlers back, and another would kill."""
    for name in _STOPS:
        if signal.getsignal(name) is _ask_for_patience:
            signal.signal(name, signal.SIG_IGN)


@contextmanager
def _stops_in_order() -> Iterator[None]:
    """Handle the signals that end a run, for the length of the block; one that the shell ignores (nohup) stays so.

    Once one has come the process is ending, and the patience asked for lasts until its end.
    """
    before = {name: signal.getsignal(name) for name in _STOPS}
    for name, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(name, _stop)
    try:
        yield
    finally:
        for name, handler in before.items():
            if signal.getsignal(name) is _stop:
                signal.signal(name, handler)


def _dispatch(arguments: argparse.Namespace, console: Console) -> int:
    # Each command is imported when it is asked for: torch, Ray and DeepSpeed take seconds to import.
    if arguments.command in ("run", "plan"):
        job = load_job(arguments.job, arguments.overrides)
        if arguments.command == "plan":
            from distributed_unlearn.commands.plan import run_plan

            run_plan(job, console)
        else:
            from distributed_unlearn.commands.run import run_command

            if not run_command(job, console) and not arguments.allow_incomplete:
                return INCOMPLETE
    elif arguments.command == "evaluate":
        from distributed_unlearn.commands.evaluate import run_evaluate_command

        run_evaluate_command(load_evaluation(arguments.evaluation, arguments.overrides), console)
    elif arguments.command in ("compare", "report"):
        _compare_or_report(arguments, console)
    elif arguments.command in SERVICE_COMMANDS:
        run_service_command(arguments, console)
    elif arguments.command == "submit":
        return run_submit(arguments, console)
    elif arguments.command == "demo":
        if arguments.service:
            require_service_extra("demo --service")
        from distributed_unlearn.demo.run import run_demo
        from distributed_unlearn.demo.settings import demo_settings

        cluster, settings = _cluster(arguments, arguments.address), demo_settings(arguments.seed, arguments.short)
        if arguments.service:
            from distributed_unlearn.demo.service import run_service_demo

            folder = arguments.output or Path("runs/demo_service")
            return 0 if run_service_demo(settings, cluster, folder, arguments.overwrite, console) else INCOMPLETE
        run_demo(settings, cluster, arguments.output or Path("runs/demo"), arguments.overwrite, console)
    elif arguments.check == "spectrum":
        _check_spectrum(arguments, console)
    else:
        from distributed_unlearn.commands.check import model_to_check, run_curvature_check
        from distributed_unlearn.workers.messages import CurvatureCheck

        check = CurvatureCheck(
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            seed=arguments.seed,
            product=arguments.product,
            mode=arguments.mode,
            reference=arguments.reference,
        )
        model = model_to_check(arguments.model, arguments.task, arguments.adapter, arguments.dtype)
        run_curvature_check(model, arguments.dtype, _cluster(arguments, None), check, console)
    return 0


def _compare_or_report(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.command == "report":
        from distributed_unlearn.commands.report import run_report

        run_report(arguments.folders, arguments.output, arguments.overwrite, console)
        return
    from distributed_unlearn.config.compare import load_compare

    config = load_compare(arguments.comparison, arguments.overrides)
    from distributed_unlearn.commands.compare import run_compare

    run_compare(config, console)


def _check_spectrum(arguments: argparse.Namespace, console: Console) -> None:
    job = load_job(arguments.job, arguments.overrides)
    from distributed_unlearn.commands.spectrum import read_epochs, run_spectrum
    from distributed_unlearn.rounds.spectrum import SpectrumSettings

    settings = SpectrumSettings(
        epochs=read_epochs(arguments.epochs),
        max_records=arguments.max_records,
        exact_up_to=arguments.exact_up_to,
        num_probes=arguments.probes,
        num_steps=arguments.lanczos_steps,
    )
    run_spectrum(job, settings, console)


def _cluster(arguments: argparse.Namespace, address: str | None) -> ClusterConfig:
    backend = getattr(arguments, "backend", "ray")
    return parse_cluster(
        {
            "num_workers": arguments.num_workers or (1 if backend == "in_process" else 2),
            "zero_stage": arguments.zero_stage,
            "address": address,
            "backend": backend,
            "use_gpu": getattr(arguments, "use_gpu", "auto"),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    # Where there is no terminal to ask (a file, a Ray job's log), rich would fold tables at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=110)
    errors = Console(stderr=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _stops_in_order():
            return _dispatch(_parse(argv), console)
    except UserError as error:
        return _report(error, errors)
    except KeyboardInterrupt:
        _ignore_stops()
        errors.print("interrupted; nothing was left half-written", highlight=False)
        return 130
    except SystemExit as error:
        if error.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP):
            _ignore_stops()
            errors.print("terminated; nothing was left half-written", highlight=False)
        raise
    except Exception as error:
        if (refusal := unwritable(error)) is None:
            raise  # a bug of ours
        return _report(refusal, errors)


def _report(error: UserError, errors: Console) -> int:
    """Say what was refused, in three sentences; returns the exit code."""
    if isinstance(error, WorkerError) and error.worker_traceback:
        errors.print(error.worker_traceback, markup=False, highlight=False, soft_wrap=True)
    errors.print(f"error ({error.kind}): got {error.got}", style="bold red", markup=False, soft_wrap=True)
    errors.print(f"  expected: {error.expected}", markup=False, highlight=False, soft_wrap=True)
    errors.print(f"  to fix it: {error.remedy}", markup=False, highlight=False, soft_wrap=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
