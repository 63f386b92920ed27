"""Trains a generator on token shards.

    deepspeed launchers/train.py --config rear_xl.yaml
    torchrun --nproc-per-node 8 launchers/train.py --config rear_xl.yaml strategy=fsdp2
    python launchers/train.py --config demo.yaml strategy=single

The same command again resumes from the newest checkpoint of run.dir. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save and end with
exit code 75; a second Ctrl-C ends at once. --check only checks whether all nodes are fit for the run: shards, run folder, GPUs,
all-reduce.
"""

from collections.abc import Callable
from pathlib import Path

from rear_scale import cli
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.evaluate.training_scores import check_training_scores, training_hooks
from rear_scale.peers import LostRanks
from rear_scale.progress import say
from rear_scale.report.writing import RunReport
from rear_scale.run.folder import RunFolder
from rear_scale.run.sinks import check_sinks
from rear_scale.sample.sheets import check_grids, grid_hooks
from rear_scale.scaling.expected_curve import BandWatch
from rear_scale.train import dry_run, preflight, setup
from rear_scale.train.loop import Hooks, train
from rear_scale.train.validation import Validation
from rear_scale.world import Ranks, joined

_LONGEST_SUSPENSION_S = 7 * 86_400
_COLLECTIVE_S = 1800


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="check whether all nodes are fit for this run, and stop")
    command = cli.parse(parser)
    cfg = command.cfg
    if command.args.dry_run:
        dry_run.show(cfg, command.ranks, command.given, full=command.args.full)
        return
    cfg, note = setup.with_classes(cfg, command.given)
    if note and command.ranks.rank == 0:
        say(note)
    if command.args.check:
        preflight.check(cfg, command.ranks)
        return
    try:
        _train(cfg, command.ranks)
    except InputError as error:
        if command.ranks.rank == 0:
            RunFolder(cfg.run.dir).refuse(f"InputError: {error}")
        raise
    except LostRanks:
        raise  # the line of the rank that has ended says why
    except Exception as error:
        RunFolder(cfg.run.dir).record_traceback(command.ranks.rank, error)
        raise


def _train(cfg: ExperimentConfig, ranks: Ranks) -> None:
    check_sinks(cfg, ranks.rank)
    data = setup.check_data(cfg, ranks)
    check_grids(cfg, data.manifest)
    check_training_scores(cfg, data.manifest)
    # The watchdog ends hanging ranks. A timeout of collectives would also count the time for which a job is suspended, so it is
    # long where there is a watchdog.
    timeout_s = _LONGEST_SUSPENSION_S if cfg.guard.hang_timeout_s else _COLLECTIVE_S
    with joined(ranks, timeout_s=timeout_s) as world:
        tokens, codebook = data.open(world)
        grids, scores = grid_hooks(cfg, world), training_hooks(cfg, world)
        missing: list[Callable[[int, Path], None]] = [
            *(hook.make_missing for hook in grids),
            *(hook.make_missing for hook in scores),
        ]
        report = RunReport(Path(cfg.run.dir), world)
        hooks = Hooks(on_checkpoint=[*grids, *scores, report], on_resume=missing)
        if world.is_main:
            hooks.on_log.append(BandWatch(cfg, RunFolder(cfg.run.dir)))
        if cfg.train.val_every:
            hooks.validate.append(Validation(cfg, data.open_val(world), codebook, world))
        with report:
            train(cfg, data.plan, world, tokens, codebook, hooks)
    weights = [] if cfg.tokenizer.weights else ["tokenizer.weights=WEIGHTS"]
    cli.end(
        cfg.run.dir, RunFolder(cfg.run.dir).in_a_number(), cli.typed("sample", "--checkpoint", cfg.run.dir, *weights)
    )


if __name__ == "__main__":
    cli.run(main)
