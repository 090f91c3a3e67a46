"""`epi-kernels reproduce`: both papers' tables at the size this machine allows.

Started by torchrun or accelerate launch, its ranks make the same runs one after the other: they share out each step's
rows and each evaluation's examples, and the first of them writes and speaks.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epi_kernels.finetune.ranks import Ranks
    from epi_kernels.repro.preset import Preset
    from epi_kernels.repro.store import Store
    from epi_kernels.repro.sweep import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        default="small",
        metavar="NAME",
        help="small (two cores, minutes), medium (one GPU), paper (the real models and data), or a .yaml file of that form (small)",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="NAME",
        help="tables to make (all that the preset has plans for); --list names them",
    )
    parser.add_argument("--list", action="store_true", help="name the tables and end")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="for the tables, the page and the runs; a second call goes on where the first stopped, and its tables join"
        " those on the page (reproduce_out/NAME, of the preset)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop in time; run again to go on"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the preset's")
    parser.add_argument(
        "--without", nargs="+", metavar="ARM", help="leave arms out: those that the device has no room for"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of one thread each (the cores; 1 on a GPU, and under torchrun)",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun or accelerate launch: weights, gradients and optimizer states lie over the ranks (FSDP2)",
    )
    parser.add_argument(
        "--discard-weights", action="store_true",
        help="remove a run's weights as soon as no run that is left starts from them; what needs them later makes them again",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and end")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 done or stopped by --time-limit, 1 a run failed or is still to be made, 2 a bad argument."""
    from epi_kernels.finetune.errors import UserError
    from epi_kernels.finetune.ranks import joined

    try:
        with joined() as ranks:
            try:
                with ranks.speaking():
                    return _run(args, ranks)
            except UserError as error:
                if ranks.first or not error.shared:
                    print(f"epi-kernels reproduce: {error}", file=sys.stderr)
                if ranks.size > 1 and not error.shared:
                    raise SystemExit(error.status) from None  # this rank's alone: nobody waits for it
                return error.status
    except UserError as error:  # the launcher's environment
        print(f"epi-kernels reproduce: {error}", file=sys.stderr)
        return error.status


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    from epi_kernels.finetune.model import pick_device, quiet_libraries
    from epi_kernels.repro.contents import contents, with_contents
    from epi_kernels.repro.store import Store
    from epi_kernels.repro.sweep import sweep

    preset, names = ranks.together(_chosen, args)
    if args.list:
        return _list_tables(preset)
    quiet_libraries()
    ranks.together(_refuse_unknown_keys, preset)
    out = _out(args)
    store = Store(out / "runs")
    preset = ranks.together(with_contents, preset, ranks.first_does(contents, preset, store.folder))
    plan = ranks.together(_plan, preset, names)
    ranks.refuse_differences(
        {
            "--out": str(out),
            "--time-limit": args.time_limit,
            "--fsdp": args.fsdp,
            "the runs": list(plan.runs),
        },
        "give all the same arguments, presets and version of epi-kernels",
    )
    missing = ranks.first_does(_missing, plan, store)
    print(
        f"{preset.name}: {len(names)} tables from {len(plan.runs)} runs, {len(missing)} of them to be made",
        flush=True,
    )
    if args.dry_run:
        _list(plan, missing)
        _name_unpinned(preset)
        return 0
    device = ranks.together(pick_device, args.device, ranks)
    workers = ranks.together(_workers, args.workers, device, len(missing), ranks)
    outcome = None
    if missing:
        with _bar(plan, missing, ranks) as bar:
            outcome = sweep(
                plan, store, device=_torch_device(device), workers=workers, time_limit_s=args.time_limit,
                progress=bar, ranks=ranks, fsdp=args.fsdp, discard=args.discard_weights,
            )  # fmt: skip
    if outcome is not None and outcome.left:
        print(
            f"stopped at the time limit: {outcome.left} of {len(plan.runs)} runs are left; the same command goes on"
        )
        return 0
    ranks.first_does(_write, args, out, preset, names, store)
    return 0


def _refuse_unknown_keys(preset: Preset) -> None:
    from epi_kernels.repro.config import ModelSpec
    from epi_kernels.repro.contents import specs_of
    from epi_kernels.repro.models import refuse_unknown_keys

    for spec in specs_of(preset):
        if isinstance(spec, ModelSpec):
            refuse_unknown_keys(spec)


def _out(args: argparse.Namespace) -> Path:
    """Where it all goes; presets do not share a folder unless they are told to."""
    return args.out or Path("reproduce_out") / Path(args.preset).stem


def _chosen(args: argparse.Namespace) -> tuple[Preset, list[str]]:
    """The preset and the names of its tables that are wanted."""
    from epi_kernels.repro.config import TaskSpec
    from epi_kernels.repro.contents import specs_of
    from epi_kernels.repro.errors import ReproError
    from epi_kernels.repro.preset import load_preset
    from epi_kernels.repro.tables import TABLES, tables_of
    from epi_kernels.repro.tasks import make_task

    preset = load_preset(args.preset)
    for spec in specs_of(preset):
        if isinstance(spec, TaskSpec):
            # a judge, a source or a harness that its kind does not have is named before anything is made
            make_task(spec)
    if args.seeds:
        preset = preset.with_seeds(args.seeds)
    if args.without:
        preset = preset.without(args.without)
    names = list(dict.fromkeys(args.table or preset.tables or tables_of(preset)))
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise ReproError(f"--table {' '.join(unknown)}: no such table; there are {', '.join(TABLES)}")
    if not (names or args.list):
        raise ReproError(f"--preset {args.preset}: has no plan, so there is no table to make")
    if args.time_limit is not None and not args.time_limit > 0:
        raise ReproError(f"--time-limit {args.time_limit}: must be above 0")
    if (out := _out(args)).exists() and not out.is_dir():
        raise ReproError(f"--out {out}: is a file; name a directory")
    return preset, names


def _plan(preset: Preset, names: list[str]) -> Plan:
    from epi_kernels.repro.output import planned

    return planned(preset, names)


def _missing(plan: Plan, store: Store) -> list[str]:
    plan.manifests(store)  # one of another version is named now, not when everything else is done
    return plan.missing(store)


def _write(args: argparse.Namespace, out: Path, preset: Preset, names: list[str], store: Store) -> None:
    from epi_kernels.repro import output
    from epi_kernels.repro.errors import ReproError

    names = output.with_earlier(out, preset, names, store)
    command = f"epi-kernels reproduce --preset {args.preset} --table {' '.join(names)}"
    if args.seeds:
        command += f" --seeds {' '.join(map(str, args.seeds))}"
    if args.without:
        command += f" --without {shlex.join(args.without)}"
    try:
        output.write(out, preset, names, output.planned(preset, names).manifests(store), command)
    except OSError as error:
        raise ReproError(
            f"{out}: cannot be written ({error}); the runs are kept: run the same command again"
        ) from None
    print(f"The page: {out / output.PAGE}   Tables: {out / output.TABLES_FOLDER}")


def _list_tables(preset: Preset) -> int:
    from epi_kernels.repro.tables import TABLES, tables_of

    known = tables_of(preset)
    for name, table in TABLES.items():
        print(f"{name:22} {table.title} ({table.source}){'' if name in known else '  - not in this preset'}")
    _name_unpinned(preset)
    return 0


def _name_unpinned(preset: Preset) -> None:
    """What the runs' keys do not hold: it may be another thing when a run is made."""
    from epi_kernels.repro.contents import specs_of
    from epi_kernels.repro.pins import unpinned

    if names := unpinned(specs_of(preset)):
        print(
            f"may change on the hub under the same name: {', '.join(names)}; `revision` (`tokenizer_revision`) with a"
            " commit's hash beside the name fixes it"
        )


def _list(plan: Any, missing: list[str]) -> None:
    from epi_kernels.repro.describe import describe

    for name in missing:
        run = plan.runs[name]
        print(f"{name}  seed {run.seed}  {describe(run)}")


def _bar(plan: Any, missing: list[str], ranks: Ranks) -> Any:
    from tqdm import tqdm

    from epi_kernels.repro.lengths import steps_of

    total = ranks.first_does(lambda: sum(steps_of(plan.runs[name]) for name in missing))
    return tqdm(total=total, unit="step", desc="training", file=sys.stderr, mininterval=0.5)


def _workers(asked: int | None, device: str, runs: int, ranks: Ranks) -> int:
    from epi_kernels.repro.errors import ReproError
    from epi_kernels.workers import usable_cores

    if asked is not None and asked < 1:
        raise ReproError(f"--workers {asked}: must be at least 1")
    if ranks.size > 1:
        if asked not in (None, 1):
            raise ReproError(f"--workers {asked}: {ranks.size} ranks make each run together; leave it out")
        return 1
    if asked is None:
        asked = 1 if device.startswith("cuda") else usable_cores()
    return min(asked, runs)


def _torch_device(name: str) -> Any:
    import torch

    return torch.device(name)
