"""Trains a generator on token shards.

    deepspeed launchers/train.py --config rear_xl.yaml
    torchrun --nproc-per-node 8 launchers/train.py --config rear_xl.yaml strategy=fsdp2
    python launchers/train.py --config demo.yaml strategy=single

The same command again resumes from the newest checkpoint of run.dir. SIGTERM and SIGUSR1 to the ranks save and end with exit
code 75. --check only sees whether all nodes are fit for the run: shards, run folder, GPUs, all-reduce.
"""

from rear_scale import cli
from rear_scale.evaluate.training import check_training_scores, training_hooks
from rear_scale.sample.training import check_grids, grid_hooks
from rear_scale.train import dry_run, preflight, setup
from rear_scale.train.loop import Hooks, train
from rear_scale.train.validation import Validation
from rear_scale.train.wandb_sink import check_wandb
from rear_scale.world import joined


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="see whether all nodes are fit for this run, and stop")
    command = cli.parse(parser)
    cfg = command.cfg
    if command.args.dry_run:
        dry_run.show(cfg, command.ranks)
        return
    if command.args.check:
        preflight.check(cfg, command.ranks)
        return
    check_wandb(cfg, command.ranks.rank)
    data = setup.check_data(cfg, command.ranks)
    check_grids(cfg, data.manifest)
    check_training_scores(cfg, data.manifest)
    with joined(command.ranks) as world:
        tokens, codebook = data.open(world)
        hooks = Hooks(on_checkpoint=[*grid_hooks(cfg, world), *training_hooks(cfg, world)])
        if cfg.train.val_every:
            hooks.validate.append(Validation(cfg, data.open_val(world), codebook, world))
        train(cfg, data.plan, world, tokens, codebook, hooks)


if __name__ == "__main__":
    cli.run(main)
